"""How many ranks compute how fast. Oracle: proportions worked out by hand."""

from __future__ import annotations

import argparse

import pytest

from mhc_dist.bench.ranks import add_rank_options, slow_motion_of


@pytest.mark.parametrize(
    ("num_ranks", "cores", "want"), [(4, 2, 4.5), (8, 2, 7.5), (4, 4, 3.0), (4, 16, 1.875)]
)
def test_default_slow_motion(
    num_ranks: int, cores: int, want: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 1.5 for every rank that a core carries, plus 1.5."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert slow_motion_of(options("--ranks", str(num_ranks))) == want


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--ranks", "4", "--slow-motion", "0"], "must be at least 1"),
        (["--ranks", "4", "--slow-motion", "nan"], "must be at least 1"),
        (["--slow-motion", "3"], "pass --ranks 4 or 8"),
    ],
)
def test_slow_motion_that_cannot_be_is_refused(arguments: list[str], remedy: str) -> None:
    """Oracle: the remedies written here by hand; none falls back to the default."""
    with pytest.raises(ValueError, match=remedy):
        slow_motion_of(options(*arguments))


def test_two_ranks_compute_in_real_time() -> None:
    """Oracle: None stands for it."""
    assert slow_motion_of(options()) is None


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_rank_options(parser)
    return parser.parse_args(arguments)
