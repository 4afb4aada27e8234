"""Figures as readers see them, and small pieces of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_dist.results.result_file import ResultFile


def shown(value: object, form: str) -> str:
    """`value` in one of the forms that `page.yaml` uses. ValueError for a form or value it does not know.

    %: share in percent; +%: difference in percent; x: times; s: seconds; MB, GB: bytes; int: with thousands;
    or any format of Python's own, such as .3g.
    """
    if value is None:
        return "none"
    if form == "text" or isinstance(value, str):
        return str(value)
    if not isinstance(value, int | float):
        raise ValueError(f"a figure cannot be shown as {form!r}: it is a {type(value).__name__}")
    match form:
        case "%":
            return f"{100 * value:.1f} %"
        case "+%":
            return f"{100 * value:+.1f} %"
        case "x":
            return f"{value:,.0f} times" if value >= 100 else f"{value:.2f} times"
        case "s":
            return f"{value:.3g} s"
        case "MB":
            return f"{value / 1e6:.1f} MB"
        case "GB":
            return f"{value / 1e9:.1f} GB"
        case "int":
            return f"{value:,.0f}"
        case _:
            return format(value, form)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def provenance(file: ResultFile, folder_name: str) -> str:
    """Where a table's figures come from, in one line."""
    when = "" if file.time is None else f", {file.time[:10]}"
    return (
        f"<sub>{file.label}. `{file.command}`, commit {file.commit}, {file.machine} with {file.cores} cores,"
        f" load {file.load:.1f}{when}: [{file.path.name}]({folder_name})</sub>"
    )
