"""What a phase that runs beside compute waits for: the end of what made what it reads, no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.pipeline.action import CHUNK_INPUT, CHUNK_OUTPUT, ChunkShape, PhaseShape
from mhc_dist.pipeline.executor import Executor, Microbatch
from mhc_dist.pipeline.hazards import Entry, Record, Wait, find_hazards
from mhc_dist.pipeline.lower import lower_evaluation
from mhc_dist.pipeline.phase import Phase, WeightQueue
from mhc_dist.pipeline.recording import RecordedStreams, Recorder
from mhc_dist.pipeline.transport import GroupTransport
from tests.unit.parallel.recorded_run import loopback

DOUBLE = PhaseShape("double", (CHUNK_INPUT,), ("doubled",))
NEGATE = PhaseShape("negate", ("doubled",), (CHUNK_OUTPUT,))
SHAPE = ChunkShape((DOUBLE, NEGATE))


def forward(rank: int) -> list[Entry]:
    """The log of one forward of two chunks on each of two ranks, every phase on the urgent stream."""
    program = lower_evaluation((0, 1, 1, 0), (SHAPE,) * 4, num_microbatches=1)
    recorder, given = Recorder(), torch.ones(3)
    with recorder, loopback():
        streams = RecordedStreams(recorder)
        phases = (
            Phase(DOUBLE, lambda x: streams.urgently(lambda x: (x * 2.0,), x)),
            Phase(NEGATE, lambda x: streams.urgently(lambda x: (-x,), x)),
        )
        chunks: dict[int, Any] = {
            index: SimpleNamespace(
                index=index, shape=SHAPE, items=phases, weight_queue=WeightQueue(), make_keeper=lambda: None
            )
            for index, place in enumerate(program.chunk_rank)
            if place == rank
        }
        group: Any = object()
        channels = {(0, 1): group, (1, 0): group}
        sizes: Any = (rank, (3,), torch.float32, torch.device("cpu"), streams)
        transport = GroupTransport(channels, {0: 0, 1: 1}, *sizes)
        Executor(rank, chunks, transport, streams=streams).run(program, [Microbatch(given, None)])
    return recorder.log


def awaited_by_urgent(log: list[Entry]) -> list[tuple[str, int]]:
    """Stream and position of each event that the urgent stream waits for, in order."""
    recorded = {entry.event: (entry.stream, at) for at, entry in enumerate(log) if isinstance(entry, Record)}
    return [recorded[entry.event] for entry in log if isinstance(entry, Wait) and entry.stream == "urgent"]


def test_what_comes_from_another_rank_is_awaited_on_its_lane() -> None:
    """Oracle: by hand, for the rank in the middle of the V: a message, a phase's end, the end of the chunk
    before on the same rank, a phase's end; each later than the one before, and nothing is missing.
    """
    log = forward(1)
    assert not find_hazards(log)
    awaited = awaited_by_urgent(log)
    assert [stream for stream, _ in awaited] == ["message 0>1", "compute", "compute", "compute"]
    assert awaited == sorted(set(awaited), key=lambda place: place[1])


def test_what_is_given_needs_no_wait() -> None:
    """Oracle: by hand, for the rank that holds the ends of the V: its text is there from the start."""
    log = forward(0)
    assert not find_hazards(log)
    assert [stream for stream, _ in awaited_by_urgent(log)] == ["compute", "message 1>0", "compute"]


def test_what_an_exchange_brings_is_there_after_its_token() -> None:
    """Oracle: the checker: the urgent stream reads the plan that the host made of counts, beside compute, and
    the rows that it asked for.
    """
    recorder, sent = Recorder(), torch.tensor([1, 0, 2, 1])
    with recorder, loopback():
        streams, group = RecordedStreams(recorder), object()
        exchange = ExpertExchange(4, 2, group, group, streams)  # type: ignore[arg-type]
        counts = exchange.issue_counts(sent)
        plan = counts.wait()
        with streams.reading([counts.token]):
            streams.urgently(lambda order_S: (order_S + 1,), plan.order_S)
        rows = exchange.issue_dispatch(torch.ones(sum(plan.send_counts), 3), plan)
        arrived = rows.wait()
        with streams.reading([rows.token]):
            streams.urgently(lambda rows_SC: (rows_SC + 1,), arrived)
    assert not find_hazards(recorder.log)
