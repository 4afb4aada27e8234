"""Coarse schedules: golden files reviewed by eye, rules over a grid, torch's own orders as outside oracle."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Pair, Slot
from mhc_dist.pipeline.schedules.forward_only import forward_order
from mhc_dist.pipeline.schedules.interleaved import interleaved
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.unit_costs import UnitCosts, run_unit_costs

GOLDEN = Path(__file__).parents[2] / "golden" / "schedules"
GRID = [(p, m) for p in range(1, 17) for m in range(1, 65)]


def ops_of_rank(slots: tuple[Slot, ...]) -> list[Op]:
    return [
        op for slot in slots for op in ([slot] if isinstance(slot, Op) else [slot.forward, slot.backward])
    ]


def allowed(name: str, num_ranks: int, num_microbatches: int) -> bool:
    """The documented limits of each schedule, written down independently of the code that checks them."""
    match name:
        case "dualpipe":
            even = num_ranks % 2 == 0 and num_microbatches % 2 == 0
            return even and num_microbatches >= 2 * num_ranks
        case "dualpipev":
            return num_microbatches >= 2 * num_ranks
        case "interleaved":
            return num_microbatches % num_ranks == 0
        case "zbv":
            return num_microbatches >= 2 * num_ranks - 1
        case _:
            return True


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_golden_schedules(path: Path) -> None:
    """Oracle: files reviewed by eye, named schedule-P-M.txt."""
    name, num_ranks, num_microbatches = path.stem.rsplit("-", 2)
    assert make_schedule(name, int(num_ranks), int(num_microbatches)).text() == path.read_text()


def test_every_schedule_has_a_golden_file() -> None:
    """Oracle: the registry."""
    assert {path.stem.rsplit("-", 2)[0] for path in GOLDEN.glob("*.txt")} == set(SCHEDULES)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_limits(name: str) -> None:
    """Oracle: the documented limits; a refusal names both numbers given."""
    for num_ranks, num_microbatches in GRID:
        if allowed(name, num_ranks, num_microbatches):
            make_schedule(name, num_ranks, num_microbatches)
        else:
            with pytest.raises(ValueError, match=r"num_(ranks|microbatches)=\d+.*(Set|Raise) "):
                make_schedule(name, num_ranks, num_microbatches)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_pass_exactly_once(name: str) -> None:
    """Oracle: counting. Each microbatch goes forward and back through each chunk of one copy, once."""
    for num_ranks, num_microbatches in GRID[::5]:
        if not allowed(name, num_ranks, num_microbatches):
            continue
        schedule = make_schedule(name, num_ranks, num_microbatches)
        seen: Counter[tuple[str, int, int]] = Counter()
        for rank, slots in enumerate(schedule.ranks):
            for op in ops_of_rank(slots):
                assert schedule.chunk_rank[op.chunk] == rank
                if op.kind is OpKind.B:
                    seen["I", op.chunk, op.microbatch] += 1
                    seen["W", op.chunk, op.microbatch] += 1
                else:
                    seen[op.kind.value, op.chunk, op.microbatch] += 1
        assert set(seen.values()) == {1}
        chunks_per_copy = len(schedule.chunk_rank) // schedule.num_copies
        assert len(seen) == 3 * num_microbatches * chunks_per_copy
        for chunk in range(len(schedule.chunk_rank)):
            copy = chunk // chunks_per_copy
            size = num_microbatches // schedule.num_copies
            expected = set(range(copy * size, (copy + 1) * size))
            assert {m for kind, c, m in seen if kind == "F" and c == chunk} == expected


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_completes_and_respects_memory(name: str) -> None:
    """Oracle: published activation counts, in microbatches of a rank's whole share (gpipe: M)."""
    for num_ranks, num_microbatches in GRID[::7]:
        if not allowed(name, num_ranks, num_microbatches):
            continue
        result = run_unit_costs(make_schedule(name, num_ranks, num_microbatches), UnitCosts())
        limit = {
            "gpipe": num_microbatches,
            "1f1b": num_ranks,
            "zb1p": num_ranks,
            "zbv": num_ranks,
            "dualpipe": num_ranks + 1,
            "dualpipev": Fraction(2 * num_ranks + 1, 2),
            "interleaved": Fraction(3 * num_ranks, 2),
        }[name]
        assert max(result.peak_live_microbatches) <= limit


@pytest.mark.parametrize("name", ["zbv", "dualpipev"])
def test_no_slower_than_torch(name: str) -> None:
    """Oracle: torch.distributed.pipelining's compute orders, run on the same clock."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    torch_name = {"zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}[name]
    for num_ranks in (2, 3, 4, 8):
        for num_microbatches in (2 * num_ranks, 2 * num_ranks + 1, 4 * num_ranks):
            ours = make_schedule(name, num_ranks, num_microbatches)
            rows = visualizer.get_schedule_ops(torch_name, num_ranks, num_microbatches, 2)
            theirs = CoarseSchedule(
                "torch",
                num_microbatches,
                ours.chunk_rank,
                tuple(tuple(parse_torch(str(action)) for action in row if action) for row in rows),
            )
            for pairs_hide in (False, True):
                costs = UnitCosts(recompute=Fraction(1, 4), hide_recompute_in_pairs=pairs_hide)
                assert run_unit_costs(ours, costs).makespan <= run_unit_costs(theirs, costs).makespan
            if name == "dualpipev":
                assert ours.ranks == theirs.ranks


def parse_torch(text: str) -> Slot:
    """`3I1`, or `(0F3;3B1)OVERLAP_F_B`."""
    parts = [
        Op(OpKind(kind), int(chunk), int(microbatch))
        for chunk, kind, microbatch in re.findall(r"(\d+)([FBIW])(\d+)", text)
    ]
    return parts[0] if len(parts) == 1 else Pair(*parts)


def test_dualpipe_seen_from_one_end_is_dualpipev() -> None:
    """Oracle: DualPipeV over half the ranks, which the publication says it folds into."""
    full, folded = make_schedule("dualpipe", 8, 32), make_schedule("dualpipev", 4, 16)
    for rank in range(4):
        renamed = [
            Op(op.kind, op.chunk if op.chunk < 4 else op.chunk - 8, op.microbatch % 16)
            for op in ops_of_rank(full.ranks[rank])
        ]
        assert [(op.kind, op.microbatch) for op in renamed] == [
            (op.kind, op.microbatch) for op in ops_of_rank(folded.ranks[rank])
        ]


def test_interleaved_with_more_chunks_has_less_idle() -> None:
    """Oracle: the published idle time, (P - 1)(F + B) / v."""
    for num_chunks_per_rank in (2, 3, 4):
        schedule = interleaved(4, 16, num_chunks_per_rank)
        result = run_unit_costs(schedule, UnitCosts())
        assert set(result.idle_per_rank) == {Fraction(9, num_chunks_per_rank)}
    with pytest.raises(ValueError, match="num_chunks_per_rank=1"):
        interleaved(4, 16, 1)


def test_unknown_name_lists_known_ones() -> None:
    """Oracle: the registry."""
    with pytest.raises(ValueError, match="1f1b, dualpipe, dualpipev, gpipe, interleaved, zb1p, zbv"):
        make_schedule("2f2b", 2, 4)
    with pytest.raises(ValueError, match="num_ranks=0"):
        make_schedule("1f1b", 0, 4)


@pytest.mark.parametrize("chunk_rank", [(0,), (0, 1, 2), (0, 1, 1, 0), (0, 1, 0, 1)])
def test_forward_order_keeps_the_pipeline_full(chunk_rank: tuple[int, ...]) -> None:
    """Oracle: the lower bound, work of the busiest rank plus the fill and drain of the chunks around it."""
    num_microbatches = 8
    result = run_unit_costs(forward_order(chunk_rank, num_microbatches), UnitCosts())
    share = Fraction(max(chunk_rank) + 1, len(chunk_rank))
    work = num_microbatches * chunk_rank.count(0)
    assert result.makespan <= share * (work + len(chunk_rank) - 1)
