"""What a dump says about an action. Oracle: the ranks of a 2 x 2 run, placed by hand: 0 1 above 2 3."""

from __future__ import annotations

import pytest

from mhc_dist.parallel.doing import Doing
from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.topology import Topology

PLACE = Topology(pipeline=2, data=2, expert=2, rank=3)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Action(ActionKind.ARRIVE, 1, 0, direction=Pass.FORWARD, peer=0), "waiting for streams from rank 1"),
        (
            Action(ActionKind.ARRIVE, 1, 0, direction=Pass.BACKWARD, peer=0),
            "waiting for gradients from rank 1",
        ),
        (Action(ActionKind.WAIT, 1, 0, "dispatch.2", Pass.FORWARD), "waiting for tokens of rank 2"),
        (Action(ActionKind.STEP), "waiting for gradients of ranks 0, 1, 2"),
    ],
)
def test_waits_name_the_ranks_they_wait_for(action: Action, words: str) -> None:
    assert str(Doing(action, PLACE)) == f"{action}, {words}"


def test_work_waits_for_nobody() -> None:
    action = Action(ActionKind.COMPUTE, 1, 0, "attention.2")
    assert str(Doing(action, PLACE)) == str(action)


def test_one_rank_and_many() -> None:
    step = Action(ActionKind.STEP)
    assert str(Doing(step, Topology(1, 1, 1))).endswith("no other rank")
    assert str(Doing(step, Topology(4, 8, 8, 5))).endswith("ranks 0..31")
