"""The sentences with which a run ends early. One line per rank, except the dump of a stuck run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from mhc_dist.guard.board import RankState, RankStatus

LONGEST_MESSAGE = 400


def lost_rank(rank: int, status: RankStatus | None, reason: str) -> str:
    """Who is gone, how we know, and what it did last."""
    if status is None:
        return f"rank {rank} never joined the run ({reason})"
    return (
        f"rank {rank} ({status.process}) died: {reason}."
        f" Last known action: {status.action}, begun {time.time() - status.action_since:.1f} s ago"
    )


def failed_rank(status: RankStatus, message: str) -> str:
    return f"rank {status.rank} ({status.process}) failed with {message}"


def error_message(error: BaseException) -> str:
    """The first line of an error, with its type: enough for other ranks to quote."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."


def dump(statuses: Mapping[int, RankStatus | None]) -> str:
    """What every rank does and since when, one line each."""
    now = time.time()
    lines = []
    for rank, status in sorted(statuses.items()):
        if status is None:
            lines.append(f"  rank {rank}: never joined")
            continue
        doing = f"{status.action} for {now - status.action_since:.1f} s"
        if status.state is not RankState.RUNNING:
            doing = f"{status.state.value} ({doing})"
        lines.append(f"  rank {rank} ({status.process}): {doing}")
    return "\n".join(lines)


def rank_list(ranks: Iterable[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
