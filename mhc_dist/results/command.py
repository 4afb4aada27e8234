"""`mhc-dist results page`: RESULTS.md, its pictures and the READMEs' figures, from the files in results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.results.collection import Collection
from mhc_dist.results.page import render
from mhc_dist.results.pictures import draw_all, is_current
from mhc_dist.results.readmes import pieces
from mhc_dist.results.repeated import compare, put_right
from mhc_dist.results.source import load_source


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist results page", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="result files (results)")
    parser.add_argument("--output", type=Path, default=Path("RESULTS.md"), help="the page (RESULTS.md)")
    parser.add_argument(
        "--readmes", type=Path, default=Path(), metavar="FOLDER", help="where READMEs are put right (here)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail if page, pictures or READMEs are not current, and say where",
    )
    options = parser.parse_args(arguments)
    try:
        if not options.results.is_dir():
            raise ValueError(f"there is no folder {options.results}: run this where results/ is, or name it.")
        work = check if options.check else write
        return work(options.results, options.output, options.readmes)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE


def write(results: Path, output: Path, readmes: Path) -> int:
    """Draw what has changed, then write the page and the READMEs' figures."""
    source = load_source()
    collection = Collection(results, source.results)
    repeated, missing = pieces(collection)
    drawn = draw_all(collection, list(source.pictures.values()))
    output.write_text(render(collection, source))
    names = ", ".join(path.name for path in drawn) or "none, all are current"
    print(f"written to {output}; pictures drawn: {names}")
    replaced = put_right(readmes, repeated)
    print(f"figures in READMEs: {len(replaced) or 'none'} replaced")
    for stale in replaced:
        print(f"  {stale.file}:{stale.line}: {stale.found!r} is now {stale.wanted!r}")
    for reason in missing:
        print(f"  some could not be looked up: {reason}")
    return ExitCode.OK


def check(results: Path, output: Path, readmes: Path) -> int:
    """Say what is not current."""
    source = load_source()
    collection = Collection(results, source.results)
    stale = [
        picture.file
        for picture in source.pictures.values()
        if picture.draw and (results / picture.file).is_file() and not is_current(collection, picture)
    ]
    if not output.is_file() or output.read_text() != render(collection, source):
        stale.append(str(output))
    stale += map(str, compare(readmes, pieces(collection)[0]))
    if stale:
        raise ValueError("not current:\n  " + "\n  ".join(stale) + "\nRun `make results`.")
    print(f"{output}, its pictures and the READMEs' figures are current")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
