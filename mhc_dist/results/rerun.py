"""`mhc-dist results rerun`: measures everything again, one command after the other. Hours."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.results.collection import Collection
from mhc_dist.results.source import load_source


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist results rerun", description=__doc__)
    parser.add_argument("--missing", action="store_true", help="only what has no file yet")
    parser.add_argument("--list", action="store_true", help="print the commands instead")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    lines = commands(options.results, only_missing=options.missing)
    if options.list:
        print("\n".join(lines))
        return ExitCode.OK
    failed = [line for number, line in enumerate(lines) if not _run(line, number, len(lines))]
    if failed:
        print("mhc-dist: failed: " + "; ".join(failed), file=sys.stderr)
        return ExitCode.ERROR
    return ExitCode.OK


def commands(results: Path, *, only_missing: bool) -> list[str]:
    """Each once, in the order of `page.yaml`; the planned table last."""
    source = load_source()
    collection = Collection(results, source.results)
    wanted = [
        known.command
        for name, known in source.results.items()
        if not only_missing or collection.get(name) is None
    ]
    return [*dict.fromkeys(wanted), "mhc-dist results plans"]


def _run(line: str, number: int, total: int) -> bool:
    """Commands as a reader would type them, from this environment's bin."""
    print(f"[{number + 1} of {total}] {line}", flush=True)
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    return all(
        subprocess.run(shlex.split(part), env=environment, check=False).returncode == 0
        for part in line.split(" && ")
    )


if __name__ == "__main__":
    sys.exit(main())
