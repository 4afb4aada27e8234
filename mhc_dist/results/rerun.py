"""`mhc-dist results rerun`: measures again, one command after the other. Hours.

Without names, everything that `page.yaml` lists, and the planned table. A command that fails, or ends without
having written its file, is told at the end; the others run all the same. What was interrupted goes on with
--outdated: it leaves out what was measured at this very commit. Run it where results/ is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_dist.bench.result import conditions
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.results.collection import Collection
from mhc_dist.results.source import load_source

RESULTS = Path("results")
"""Where the commands write."""

PLANS = "plans"
"""Name of the planned table, which has a file a cell."""


@dataclass(frozen=True)
class Part:
    """A command under the name of its result. line: as a reader types it. path: the file that it writes, or
    (printed) whose content it prints; None for the planned table. commit: at which that file was measured,
    None if there is none.
    """

    name: str
    command: str
    line: str
    path: Path | None = None
    printed: bool = False
    commit: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mhc-dist results rerun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of results (see --list), or {PLANS}")
    parser.add_argument("--missing", action="store_true", help="only what has no file yet")
    parser.add_argument("--outdated", action="store_true", help="only what was not measured at this commit")
    parser.add_argument("--list", action="store_true", help="print names and commands instead")
    options = parser.parse_args(arguments)
    try:
        chosen = choose(parts(RESULTS), options.names)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE
    if options.missing:
        chosen = [part for part in chosen if part.commit is None]
    if options.outdated:
        now = conditions()["commit"]
        chosen = [part for part in chosen if part.commit != now]
    if options.list:
        width = 2 + max((len(part.name) for part in chosen), default=0)
        print("\n".join(f"{part.name:{width}}{part.line}" for part in chosen))
        return ExitCode.OK
    return run_all(chosen)


def parts(results: Path) -> list[Part]:
    """In the order of `page.yaml`; the planned table last."""
    source = load_source()
    collection = Collection(results, source.results)
    found = []
    for name, known in source.results.items():
        file = collection.get(name)
        commit = None if file is None else file.commit
        found.append(Part(name, known.command, known.line, results / known.file, known.printed, commit))
    plans = "mhc-dist results plans"
    return [*found, Part(PLANS, plans, plans)]


def choose(everything: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """Those of `names`, all if there are none. ValueError for a name that is none."""
    known = [part.name for part in everything]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"no result is called {', '.join(wrong)}: choose from {', '.join(known)}.")
    return [part for part in everything if not names or part.name in names]


def run_all(chosen: Sequence[Part]) -> int:
    """One after the other, whatever becomes of the one before."""
    failed = []
    for number, part in enumerate(chosen):
        print(f"[{number + 1} of {len(chosen)}] {part.line}", flush=True)
        try:
            problem = run(part)
        except KeyboardInterrupt:
            print("mhc-dist: interrupted; `mhc-dist results rerun --outdated` goes on.", file=sys.stderr)
            return ExitCode.STOPPED
        if problem is not None:
            print(f"mhc-dist: {part.name}: {problem}", file=sys.stderr, flush=True)
            failed.append(part.name)
    if failed:
        print(f"mhc-dist: failed: {', '.join(failed)}", file=sys.stderr)
        return ExitCode.ERROR
    return ExitCode.OK


def run(part: Part) -> str | None:
    """Run it, commands as a reader would type them, from this environment's bin. Returns what went wrong.

    A file is replaced by what is printed only when that is whole.
    """
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    before = _changed(part.path)
    output = subprocess.PIPE if part.printed else None
    for command in part.command.split(" && "):
        try:
            done = subprocess.run(shlex.split(command), env=environment, stdout=output, check=False)
        except OSError as error:
            return f"`{command}` cannot be run: {error}"
        if done.returncode != 0:
            return f"`{command}` ended with code {done.returncode}"
        if part.printed and (problem := _keep(done.stdout, part)) is not None:
            return problem
    if part.path is not None and _changed(part.path) == before:
        return f"wrote no {part.path}"
    return None


def _keep(printed: bytes, part: Part) -> str | None:
    assert part.path is not None
    try:
        json.loads(printed)
    except ValueError as error:
        return f"printed no JSON: {error}"
    part.path.parent.mkdir(parents=True, exist_ok=True)
    part.path.write_bytes(printed)
    return None


def _changed(path: Path | None) -> int | None:
    return path.stat().st_mtime_ns if path is not None and path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
