"""What is left of a microbatch when its program frees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_dist.pipeline.action import CHUNK_INPUT, CHUNK_OUTPUT, ChunkShape, PhaseShape
from mhc_dist.pipeline.live import LiveMicrobatch
from mhc_dist.pipeline.phase import Phase, WeightQueue
from mhc_dist.pipeline.streams import HostStreams


def after_backward(given: dict[str, Any], received: dict[str, Any]) -> LiveMicrobatch:
    """A microbatch whose one phase, input times side, has been forward and backward."""
    phase = Phase(PhaseShape("product", (CHUNK_INPUT, "side"), (CHUNK_OUTPUT,)), lambda x, side: (x * side,))
    chunk: Any = SimpleNamespace(
        index=0,
        shape=ChunkShape((phase.shape,)),
        items=(phase,),
        weight_queue=WeightQueue(),
        make_keeper=lambda: None,
    )
    live = LiveMicrobatch(chunk, 0, given, HostStreams(), training=True)
    for name, value in received.items():
        live.put(name, value, None)
    live.compute(phase)
    live.gradients.add(CHUNK_OUTPUT, torch.ones(2))
    live.gradient(phase, defer_weights=False)
    return live


def test_a_gradient_that_nobody_takes_is_noticed() -> None:
    """Oracle: by hand: the gradient of what came from elsewhere has to go there; of the text it cannot."""
    x, side = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    first = after_backward({CHUNK_INPUT: x}, {"side": side})
    with pytest.raises(AssertionError, match=r"chunk 0 microbatch 0: left \['gradient of side'\]"):
        first.check_finished()
    assert torch.equal(first.gradients.take("side"), x)
    first.check_finished()
    later = after_backward({}, {CHUNK_INPUT: x, "side": side})
    assert torch.equal(later.gradients.take("side"), x)
    with pytest.raises(AssertionError, match=rf"left \['gradient of {CHUNK_INPUT}'\]"):
        later.check_finished()
    assert torch.equal(later.gradients.take(CHUNK_INPUT), side)
    later.check_finished()
