"""`mhc-dist results keep RUN`: what a finished run reached, with its loss curve, for the page."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mhc_dist.bench.result import write_result
from mhc_dist.guard.exit_codes import ExitCode

LABEL = "measured: a run on this machine's processors"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist results keep", description=__doc__)
    parser.add_argument(
        "run", type=Path, help="folder of the run, such as runs/tiny; keep it as soon as it is done"
    )
    parser.add_argument("--command", help="how it was started (mhc-dist train configs/NAME.yaml)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        path = keep(options.run, options.results, options.command)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE
    print(f"written to {path}")
    return ExitCode.OK


def keep(run: Path, results: Path, command: str | None = None) -> Path:
    """results/NAME.json and results/NAME_loss.png. The commit is that of the checkout now: keep at once."""
    summary, curve = run / "summary.json", run / "loss.png"
    for path in (summary, curve):
        if not path.is_file():
            raise ValueError(f"no {path}: only a run that reached its last step can be kept.")
    figures = json.loads(summary.read_text())
    name = figures["run"]
    path = write_result(name, results, command or f"mhc-dist train configs/{name}.yaml", LABEL, figures)
    shutil.copyfile(curve, results / f"{name}_loss.png")
    return path


if __name__ == "__main__":
    sys.exit(main())
