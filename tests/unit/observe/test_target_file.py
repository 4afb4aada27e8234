"""What Prometheus finds of a rank."""

import json
from pathlib import Path

from mhc_dist.observe.target_file import announced_target, forget_targets


def test_a_target_is_there_while_the_rank_serves(tmp_path: Path) -> None:
    """Oracle: the format of Prometheus's file_sd_config."""
    with announced_target(tmp_path, "tiny", 3, "node1", 9403) as path:
        assert path.parent == tmp_path / ".targets"
        assert json.loads(path.read_text()) == [{"targets": ["node1:9403"], "labels": {"run": "tiny"}}]
    assert list((tmp_path / ".targets").iterdir()) == []


def test_a_killed_run_is_written_over(tmp_path: Path) -> None:
    """Oracle: the later of two announcements of one rank."""
    stale = tmp_path / ".targets" / "tiny.0.json"
    stale.parent.mkdir()
    stale.write_text("[]")
    with announced_target(tmp_path, "tiny", 0, "node2", 1) as path:
        assert path == stale
        assert "node2:1" in path.read_text()


def test_ranks_that_a_smaller_start_lacks_are_forgotten(tmp_path: Path) -> None:
    """Oracle: the files of a run of two ranks, after one of four was killed; those of other runs stay."""
    folder = tmp_path / ".targets"
    folder.mkdir()
    others = {"tiny.1.7.json", "tiny2.9.json", "big.3.json"}
    for name in {*(f"tiny.{rank}.json" for rank in range(4)), *others}:
        (folder / name).write_text("[]")
    forget_targets(tmp_path, "tiny", 2)
    assert {path.name for path in folder.iterdir()} == {"tiny.0.json", "tiny.1.json", *others}
