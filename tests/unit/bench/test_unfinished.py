"""Cases of a long bench on their way. Oracle: files and rows written down by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_dist.bench.unfinished import Unfinished

SETTINGS = {"commit": "abc", "rounds": 3, "config": {"schedule": {"name": "zbv"}}, "modes": ("none", "mhc")}
ROWS = [{"schedule": "zbv", "ratio": 1.01}, {"schedule": "1f1b", "ratio": 0.99}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "simulator.unfinished.jsonl"


def test_resumes_with_what_was_added(path: Path) -> None:
    """Oracle: the rows that went in, by whichever process."""
    for row in ROWS:
        Unfinished.resume(path, SETTINGS).add(row)
    assert Unfinished.resume(path, SETTINGS).rows() == ROWS


def test_begins_anew_unless_asked_to_resume(path: Path) -> None:
    """Oracle: no rows."""
    Unfinished.begin(path, SETTINGS).add(ROWS[0])
    assert Unfinished.begin(path, SETTINGS).rows() == []


def test_a_row_that_was_cut_off_is_measured_again(path: Path) -> None:
    """Oracle: the rows before it; the next one is not glued to its rest."""
    Unfinished.begin(path, SETTINGS).add(ROWS[0])
    path.write_text(path.read_text() + '{"schedule": "1f')
    resumed = Unfinished.resume(path, SETTINGS)
    resumed.add(ROWS[1])
    assert resumed.rows() == ROWS


def test_a_file_cut_off_within_its_settings_is_refused(path: Path) -> None:
    """Oracle: nobody knows what its cases would have been measured with."""
    path.parent.mkdir()
    path.write_text('{"commit": "ab')
    with pytest.raises(ValueError, match="Leave out --resume"):
        Unfinished.resume(path, SETTINGS)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"commit": "def"}, 'commit "abc", now "def"'),
        ({"rounds": 2}, "rounds 3, now 2"),
        ({"slow_motion": 4.5}, "slow_motion null, now 4.5"),
    ],
)
def test_cases_of_other_runs_are_never_mixed_in(changed: dict[str, object], text: str, path: Path) -> None:
    """Oracle: the difference, named with both values; the file stays as it is."""
    Unfinished.begin(path, SETTINGS).add(ROWS[0])
    before = path.read_text()
    with pytest.raises(ValueError, match=text):
        Unfinished.resume(path, SETTINGS | changed)
    assert path.read_text() == before
