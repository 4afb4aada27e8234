"""How the checks for a GPU are run: each in a process of its own, so that none hides the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mhc_kernels import gpu_check, triton_backend
from mhc_kernels.gpu.plan import Outcome, Plan

GOOD = json.dumps(Outcome(True, {"ms": 2.0})._asdict())
PASSES = f"import sys; open(sys.argv[1], 'w').write({GOOD!r})"
SCRIPTS = {
    "good": PASSES,
    "crashes": "import os; os.write(2, b'an illegal memory access was encountered'); os.abort()",
    "hangs": "import time; time.sleep(600)",
    "says nothing": "pass",
    "good again": PASSES,
}


def test_one_check_does_not_hide_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: checks that end well, crash, hang and say nothing: each is reported for what it did, the
    figures of those that ended well are kept, and the report is there after every one of them."""
    path, lengths = tmp_path / "results" / "gpu_x.json", []

    def run(name: str) -> Outcome:
        lengths.append(len(json.loads(path.read_text())["checks"]) if path.exists() else 0)
        limit = 1.0 if name == "hangs" else 60.0
        return gpu_check.in_a_process([sys.executable, "-c", SCRIPTS[name]], limit)

    assert gpu_check.run_all(SCRIPTS, run, path, {"device": "X"}) == 1
    assert lengths == [0, 1, 2, 3, 4]
    rows = {row["name"]: row for row in json.loads(path.read_text())["checks"]}
    assert [rows[name]["passed"] for name in SCRIPTS] == [True, False, False, False, True]
    assert rows["good again"]["figures"] == {"ms": 2.0}
    assert "an illegal memory access" in rows["crashes"]["reason"]
    assert rows["hangs"]["reason"] == "did not end within 1 s"
    assert rows["says nothing"]["reason"] == "status 0: "
    told = capfd.readouterr()
    assert "2 of 5 passed, 3 failed" in told.out
    assert "FAILED hangs" in told.err


def test_what_cannot_be_run_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: the contract; but it is said, with the reason."""
    outcome = Outcome(None, {}, "needs two GPUs")
    assert gpu_check.run_all(["another"], lambda _: outcome, tmp_path / "gpu_x.json", {"device": "X"}) == 0
    told = capfd.readouterr().out
    assert "not run  another" in told
    assert "needs two GPUs" in told


def test_without_a_gpu_it_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: the exit status and the words."""
    for options, status in (([], 0), (["--require"], 1)):
        with (
            mock.patch.object(sys, "argv", ["gpu_check", *options]),
            mock.patch.object(torch.cuda, "is_available", return_value=False),
            pytest.raises(SystemExit) as ended,
        ):
            gpu_check.main()
        assert ended.value.code == status
        assert "NOTHING WAS CHECKED" in capfd.readouterr().err


def test_a_device_without_tiles_is_told_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: the contract: one message with the remedy, not a failure of every check."""
    with (
        mock.patch.object(sys, "argv", ["gpu_check"]),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(triton_backend, "device_architecture", return_value="sm_70"),
        pytest.raises(SystemExit) as ended,
    ):
        gpu_check.main()
    assert ended.value.code == 1
    assert "the GPU is sm_70, tiles.py has sm_90, sm_100, gfx942: add a row" in capfd.readouterr().err


def test_a_check_that_does_not_exist_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: the contract; the message lists what there is."""
    with mock.patch.object(sys, "argv", ["gpu_check", "--only", "nothing"]), pytest.raises(SystemExit):
        gpu_check.main()
    told = capfd.readouterr().err
    assert "there is no check 'nothing'" in told
    assert all(name in told for name in gpu_check.checks(Plan()))
