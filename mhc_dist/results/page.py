"""RESULTS.md from result files, pictures and `page.yaml`."""

from __future__ import annotations

import re

from mhc_dist.results.claims import Judged, claims_table, judge
from mhc_dist.results.collection import Collection, NotMeasuredError
from mhc_dist.results.shown import table
from mhc_dist.results.source import Section, Source
from mhc_dist.results.tables import TABLES

HEAD = """# Results

<!-- Written by `mhc-dist results page` (`make results`) from the files in results/. Edit those commands, or
mhc_dist/results/page.yaml, not this page. -->
"""


def render(collection: Collection, source: Source) -> str:
    """The whole page. Deterministic: the same files give the same page."""
    judged = {
        section.title: [judge(collection, claim) for claim in section.claims] for section in source.sections
    }
    parts = [HEAD, collection.filled(source.intro), _overview(judged)]
    parts += [_section(collection, source, section, judged[section.title]) for section in source.sections]
    parts.append(_again(collection))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def anchor(title: str) -> str:
    """The link that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _overview(judged: dict[str, list[Judged]]) -> str:
    rows = [
        [
            j.claim.what,
            j.asked,
            "" if j.holds is None else j.reached,
            j.verdict,
            f"[{title}](#{anchor(title)})",
        ]
        for title, of in judged.items()
        for j in of
    ]
    held = sum(j.holds is True for of in judged.values() for j in of)
    short = sum(j.holds is False for of in judged.values() for j in of)
    text = f"{held} hold, {short} fall short, {len(rows) - held - short} are not measured yet."
    return f"## Asked and reached\n\n{text}\n\n" + table(["", "asked", "reached", "", "section"], rows)


def _section(collection: Collection, source: Source, section: Section, judged: list[Judged]) -> str:
    parts = [f"## {section.title}", collection.filled(section.text)]
    if judged:
        parts.append(claims_table(collection, judged))
    parts += [_picture(collection, source, name) for name in section.pictures]
    for name in section.tables:
        try:
            parts.append(TABLES[name](collection))
        except NotMeasuredError as error:
            parts.append(f"*{str(error)[0].upper()}{str(error)[1:]}.*")
    parts.append(collection.filled(section.after))
    return "\n\n".join(part for part in parts if part)


def _picture(collection: Collection, source: Source, name: str) -> str:
    picture = source.pictures[name]
    if not (collection.folder / picture.file).is_file():
        return ""
    return f"![{picture.alt}](results/{picture.file})"


def _again(collection: Collection) -> str:
    rows = []
    for name, known in collection.known.items():
        file = collection.get(name)
        rows.append(
            [
                name,
                f"`{known.line}`",
                known.takes,
                "not measured yet" if file is None else (file.time or "")[:10] or "no date",
                "" if file is None else file.commit,
            ]
        )
    rows.append(["plans", "`mhc-dist results plans`", "20 min", f"{len(collection.cells)} cells", ""])
    return (
        "## Measuring again\n\n"
        "`make results` writes this page and its pictures anew from the files in results/, in seconds.\n"
        "`make results-rerun` runs all of the following, one after the other; `mhc-dist results rerun NAME`\n"
        "runs one, and `--outdated` what was not measured at this commit. Studies and plans keep the parts\n"
        "that the same code has left. While a machine does something else, its figures of seconds are worth\n"
        "little.\n\n" + table(["name", "command", "takes", "last", "commit"], rows)
    )
