"""The page of results: against the committed one, and files that were changed, cut short or taken away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mhc_dist.results.claims import NO_REASON, judge
from mhc_dist.results.collection import PLACEHOLDER, Collection
from mhc_dist.results.command import main
from mhc_dist.results.drawings import DRAWINGS
from mhc_dist.results.page import anchor, render
from mhc_dist.results.pictures import draw_all, fingerprint, is_current, read_text_chunk
from mhc_dist.results.result_file import read_result
from mhc_dist.results.shown import shown
from mhc_dist.results.source import Claim, Source, load_source
from mhc_dist.results.tables import TABLES
from mhc_dist.results.tables_overlap import OTHERS, overlap_variants

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source()


def committed(source: Source) -> Collection:
    return Collection(ROOT / "results", source.results)


def bench_file(figures: dict[str, Any], **changes: Any) -> str:
    conditions = {
        "commit": "abc1234",
        "processor": "P",
        "cores": 2,
        "load_average": [0.5],
        "time": "2026-01-02",
    }
    content = {
        "schema": 1,
        "command": "run me",
        "label": "measured",
        "conditions": conditions,
        "figures": figures,
    }
    return json.dumps(content | changes)


def test_committed_page_and_pictures_are_what_the_results_give(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: RESULTS.md and the pictures' fingerprints, as committed. If this fails: `make results`."""
    code = main(["--check", "--results", str(ROOT / "results"), "--output", str(ROOT / "RESULTS.md")])
    assert code == 0, capsys.readouterr().err


def test_everything_that_falls_short_has_a_reason(source: Source) -> None:
    """Oracle: page.yaml beside the committed figures."""
    collection = committed(source)
    for section in source.sections:
        for claim in section.claims:
            if judge(collection, claim).holds is False:
                assert claim.reason, claim.what
    assert NO_REASON not in render(collection, source)


def test_source_names_only_what_there_is(source: Source) -> None:
    """Oracle: the registries of tables and drawings, and the result files that page.yaml itself lists."""
    for section in source.sections:
        assert set(section.tables) <= TABLES.keys()
        assert set(section.pictures) <= source.pictures.keys()
        assert {claim.result for claim in section.claims} <= source.results.keys()
        reasons = [claim.reason or "" for claim in section.claims]
        for text in (section.text, section.after, *reasons):
            assert {match[1] for match in PLACEHOLDER.finditer(text)} <= source.results.keys()
            assert "{" not in PLACEHOLDER.sub("", text), f"a placeholder that is none: {text}"
    for picture in source.pictures.values():
        assert picture.draw is None or picture.draw in DRAWINGS
        assert set(picture.results) <= source.results.keys()


def test_a_page_of_nothing_tells_how_to_measure(source: Source, tmp_path: Path) -> None:
    """Oracle: every command of page.yaml, on a page written from an empty folder."""
    page = render(Collection(tmp_path, source.results), source)
    for section in source.sections:
        assert f"## {section.title}\n" in page
        assert f"(#{anchor(section.title)})" in page or not section.claims
    for known in source.results.values():
        assert f"`{known.line}`" in page
    assert "not measured yet: run `mhc-dist bench overlap`" in page
    assert "Not planned yet: run `mhc-dist results plans`" in page
    assert draw_all(Collection(tmp_path, source.results), list(source.pictures.values())) == []


def test_a_changed_figure_changes_page_and_picture(source: Source, tmp_path: Path) -> None:
    """Oracle: one figure of a copied result file, changed by hand."""
    results = tmp_path / "results"
    results.mkdir()
    path = results / "overlap_0.6.json"
    shutil.copyfile(ROOT / "results" / path.name, path)
    before = Collection(results, source.results)
    picture = source.pictures["overlap"]
    page, mark = render(before, source), fingerprint(before, picture)
    content = json.loads(path.read_text())
    content["figures"]["forward_combine_hidden_ratio"] = 0.4321
    path.write_text(json.dumps(content))
    after = Collection(results, source.results)
    assert "| forward combine hidden | at least 80.0 % | 43.2 % | **falls short** |" in render(after, source)
    assert "43.2 %" not in page
    assert NO_REASON in render(after, source)
    assert fingerprint(after, picture) != mark


def test_every_way_to_run_a_step_has_its_row(source: Source) -> None:
    """Oracle: the steps' seconds in the committed result files, whatever variants they have."""
    collection = committed(source)
    rows = overlap_variants(collection).splitlines()
    for name in ("overlap", *OTHERS):
        figures = collection.need(name).figures
        for seconds in figures["step_seconds"].values():
            assert any(f"| {shown(seconds, 's')} |" in row for row in rows), (name, seconds)


def test_pictures_carry_their_fingerprint_on_white_ground(source: Source, tmp_path: Path) -> None:
    """Oracle: the file's own text chunk, and the colour of its corner."""
    from matplotlib.image import imread

    shutil.copytree(ROOT / "results" / "kernels", tmp_path / "kernels")
    collection = Collection(tmp_path, source.results)
    picture = source.pictures["traffic"]
    assert not is_current(collection, picture)
    (path,) = draw_all(collection, [picture])
    assert is_current(collection, picture)
    assert draw_all(collection, [picture]) == []
    assert read_text_chunk(path, "Figures") == fingerprint(collection, picture)
    assert read_text_chunk(path, "Nothing") is None
    assert [round(float(value)) for value in imread(path)[0, 0][:3]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            bench_file({}, schema=2),
            "is of version 2, and this program reads version 1. Measure again with 'run me'",
        ),
        ("{", "is not JSON"),
        ("[]", "holds no result: it is a JSON list"),
        ('{"figures": {}}', "lacks 'conditions'"),
        ('{"provenance": {}, "total": 1}', "lacks 'label'"),
    ],
)
def test_files_that_are_no_results_are_refused(text: str, message: str, tmp_path: Path) -> None:
    """Oracle: the message, which names the file and what is wrong with it."""
    path = tmp_path / "memory.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)) as error:
        read_result(path)
    assert message in str(error.value)


def test_the_command_refuses_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 2 and one line; no page is written."""
    (tmp_path / "memory.json").write_text(bench_file({}, schema=7))
    assert main(["--results", str(tmp_path), "--output", str(tmp_path / "PAGE.md")]) == 2
    assert "version 7" in capsys.readouterr().err
    assert not (tmp_path / "PAGE.md").exists()
    assert main(["--results", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_figure_that_a_file_lacks_is_named(source: Source, tmp_path: Path) -> None:
    """Oracle: the message, with the figure's path and the command that would write it."""
    (tmp_path / "memory.json").write_text(bench_file({"a": {"b": 1}}))
    collection = Collection(tmp_path, source.results)
    assert collection.figure("memory", "a.b") == 1
    with pytest.raises(ValueError, match=r"no figure 'a\.c' .*mhc-dist bench memory"):
        collection.figure("memory", "a.c")


@pytest.mark.parametrize(
    ("limits", "figures", "reached", "verdict"),
    [
        ({"at_most": 2.0}, {"value": 1.0}, "1.0", "holds"),
        ({"at_least": 2.0}, {"value": 1.0}, "1.0", "**falls short**"),
        ({"at_most_figure": "limit"}, {"value": 1.0, "limit": 0.5}, "1.0", "**falls short**"),
        (
            {"at_most": 2.0, "interval": "ends"},
            {"value": 1.0, "ends": [0.5, 3]},
            "1.0 (0.5 to 3.0)",
            "holds, uncertain",
        ),
    ],
)
def test_claims_are_judged(
    limits: dict[str, Any],
    figures: dict[str, Any],
    reached: str,
    verdict: str,
    source: Source,
    tmp_path: Path,
) -> None:
    """Oracle: limits on both sides of a figure, by hand."""
    (tmp_path / "memory.json").write_text(bench_file(figures))
    claim = Claim(what="it", result="memory", value="value", shown=".1f", **limits)
    judged = judge(Collection(tmp_path, source.results), claim)
    assert judged.reached.startswith(reached)
    assert judged.verdict == verdict


def test_a_claim_has_one_limit() -> None:
    """Oracle: pydantic's validation of the source."""
    with pytest.raises(ValueError, match="one of at_most, at_least and at_most_figure"):
        Claim(what="it", result="memory", value="value", shown="%", at_most=1.0, at_least=1.0)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(0.0612, "+%", "+6.1 %"), (0.85, "%", "85.0 %"), (1.4971, "x", "1.50 times"), (12e9, "GB", "12.0 GB")],
)
def test_forms(value: float, form: str, text: str) -> None:
    """Oracle: figures written out by hand."""
    assert shown(value, form) == text
