"""The figures that READMEs repeat from results/: found by the words around them, compared, put right."""

from __future__ import annotations

from pathlib import Path

import pytest
from mhc_kernels.roofline import load_device, roofline
from mhc_kernels.spec import ConnectionSpec

from mhc_dist.config import load_config
from mhc_dist.model.count import count_parameters, three_digits
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.results.collection import Collection
from mhc_dist.results.readmes import pieces, short
from mhc_dist.results.repeated import Repeated, compare, put_right
from mhc_dist.results.source import load_source

ROOT = Path(__file__).parents[3]


def committed() -> Collection:
    return Collection(ROOT / "results", load_source().results)


def test_readmes_repeat_what_was_measured() -> None:
    """Oracle: the result files, which name the command that wrote them. If this fails: `make results`."""
    found, missing = pieces(committed())
    assert not missing
    stale = compare(ROOT, found)
    assert not stale, "older than results/, `make results` puts them right:\n" + "\n".join(map(str, stale))


def test_every_figure_of_the_table_is_held() -> None:
    """Oracle: the lines of README.md's table that have a command; none may be without a piece."""
    section = (ROOT / "README.md").read_text().split("## What has been measured")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 9
    patterns = [piece.pattern for piece in pieces(committed())[0] if piece.file == "README.md"]
    assert [line for line in lines if not any(pattern.search(line) for pattern in patterns)] == []


def test_the_readme_repeats_what_code_counts() -> None:
    """Oracle: `mhc-dist params` and `mhc-dist schedule`, as the README says."""
    text = (ROOT / "README.md").read_text()
    for name in ("3b", "9b", "27b"):
        count = count_parameters(load_config(ROOT / "configs" / f"paper_{name}.yaml"))
        cells = (three_digits(number) for number in (count.total, count.active, count.vocab))
        assert f"| {name.upper()} | {' | '.join(cells)} |" in text
    for rank, line in enumerate(make_schedule("dualpipev", 2, 4).text().splitlines()):
        assert f"    rank {rank}:  {line}\n" in text


def test_the_kernels_readme_repeats_what_is_derived() -> None:
    """Oracle: `python -m mhc_kernels.roofline --cluster h100`, as the README says."""
    device = load_device(str(ROOT / "configs" / "clusters" / "h100.yaml"))
    text = " ".join((ROOT / "kernels" / "README.md").read_text().split())
    for channels in (1280, 2560):
        row = roofline(device, 4096, channels, ConnectionSpec(num_streams=4))
        parts = " + ".join(f"{one:.0f}" for one in (row.forward_us, row.backward_us, row.recompute_us))
        assert f"C {channels}: {parts} = {row.total_us:.0f}" in text


def test_a_stale_figure_is_named_with_its_line_and_put_right(tmp_path: Path) -> None:
    """Oracle: a README written here; words, line breaks and other figures stay."""
    before = "# About\n\nIt hides 80.1 %, and\nsteps are 1.30 times as fast. 7 of 9 agree.\n"
    (tmp_path / "README.md").write_text(before)
    faster = Repeated("README.md", "hides {} %, and steps are {} times as fast.", ("82.6", "1.34"))
    agree = Repeated("README.md", "{} of 9 agree", ("7",))
    (stale,) = compare(tmp_path, [faster, agree])
    assert str(stale) == (
        "README.md:3: 'hides 80.1 %, and steps are 1.30 times as fast.' should read"
        " 'hides 82.6 %, and steps are 1.34 times as fast.'"
    )
    assert (tmp_path / "README.md").read_text() == before
    assert put_right(tmp_path, [faster, agree]) == [stale]
    assert (tmp_path / "README.md").read_text() == before.replace("80.1", "82.6").replace("1.30", "1.34")
    assert put_right(tmp_path, [faster, agree]) == []


@pytest.mark.parametrize(("text", "number"), [("nothing of the kind", 0), ("a 1 %. a 2 %.", 2)])
def test_words_that_a_readme_lost_or_has_twice_are_told(text: str, number: int, tmp_path: Path) -> None:
    """Oracle: the message; a figure that cannot be found is not taken for a current one."""
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=f"README.md has {number} pieces like 'a {{}} %'"):
        compare(tmp_path, [Repeated("README.md", "a {} %", ("1",))])


def test_figures_without_a_file_are_left_alone_and_told(tmp_path: Path) -> None:
    """Oracle: the command that would measure them."""
    found, missing = pieces(Collection(tmp_path, load_source().results))
    assert found == []
    assert "not measured yet: run `mhc-dist bench memory`" in missing


@pytest.mark.parametrize(("value", "text"), [(5.503e-4, "5.5e-4"), (0.0551, "0.055"), (1.31e-5, "1.3e-5")])
def test_short_figures(value: float, text: str) -> None:
    """Oracle: written out by hand."""
    assert short(value) == text
