"""Unit-cost figures against published formulas and hand-computed runs."""

from __future__ import annotations

from fractions import Fraction

import pytest

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.pipeline.unit_costs import UnitCosts, run_unit_costs


@pytest.mark.parametrize(
    ("name", "plain", "serial", "hidden"),
    [
        ("1f1b", "57", "61.75", "61.75"),
        ("zb1p", "51", "55.75", "55.75"),
        ("zbv", "49.5", "53.875", "53.875"),
        ("dualpipev", "51", "55.375", "52.125"),
        ("dualpipe", "50", "54.25", "51.25"),
        ("interleaved", "52.5", "56.875", "56.875"),
        ("gpipe", "57", "61.75", "61.75"),
    ],
)
def test_makespan_of_four_ranks(name: str, plain: str, serial: str, hidden: str) -> None:
    """Oracle: the figures of the design note for P = 4, M = 16, without and with recompute R = 1/4."""
    schedule = make_schedule(name, 4, 16)
    recompute = Fraction(1, 4)
    assert run_unit_costs(schedule, UnitCosts()).makespan == Fraction(plain)
    serially = UnitCosts(recompute=recompute, hide_recompute_in_pairs=False)
    assert run_unit_costs(schedule, serially).makespan == Fraction(serial)
    assert run_unit_costs(schedule, UnitCosts(recompute=recompute)).makespan == Fraction(hidden)


@pytest.mark.parametrize("num_ranks", range(2, 17))
def test_idle_formulas(num_ranks: int) -> None:
    """Oracle: idle per rank as published: 1F1B (P-1)(F+B), ZB1P (P-1)(F+B-2W), Dual (P/2-1)(FB+B-3W)."""
    for num_microbatches in (2 * num_ranks, 3 * num_ranks + num_ranks % 2, 64):
        idle = {
            name: run_unit_costs(make_schedule(name, num_ranks, num_microbatches), UnitCosts()).idle_per_rank
            for name in ("1f1b", "zb1p", "dualpipev", *(["dualpipe"] if num_ranks % 2 == 0 else []))
        }
        assert set(idle["1f1b"]) == {3 * (num_ranks - 1)}
        assert max(idle["zb1p"]) <= num_ranks - 1
        # DualPipeV over P ranks is DualPipe over 2P; its chunks are half a rank's share, so halve the cost.
        assert max(idle["dualpipev"]) <= Fraction((num_ranks - 1) * (3 + 2 - 3), 2)
        if "dualpipe" in idle:
            assert max(idle["dualpipe"]) <= (num_ranks // 2 - 1) * (3 + 2 - 3)


def test_zbv_is_nearly_free_of_idle_time() -> None:
    """Oracle: 1.5 units at P = 4, M = 16 (design note), and no rank idles longer than under ZB1P."""
    for num_ranks in (2, 4, 8, 16):
        zbv = run_unit_costs(make_schedule("zbv", num_ranks, 4 * num_ranks), UnitCosts())
        zb1p = run_unit_costs(make_schedule("zb1p", num_ranks, 4 * num_ranks), UnitCosts())
        assert max(zbv.idle_per_rank) <= max(zb1p.idle_per_rank)
    assert max(run_unit_costs(make_schedule("zbv", 4, 16), UnitCosts()).idle_per_rank) == Fraction(3, 2)


def test_circular_wait_is_reported() -> None:
    """Oracle: by hand; rank 1 wants the gradient before it has run the forward that leads to it."""
    f, b = OpKind.F, OpKind.B
    schedule = CoarseSchedule("circle", 1, (0, 1), ((Op(f, 0, 0), Op(b, 0, 0)), (Op(b, 1, 0), Op(f, 1, 0))))
    with pytest.raises(ValueError, match="rank 0 waits for ever in slot 0B0"):
        run_unit_costs(schedule, UnitCosts())
