"""Parameter counts as a table for people."""

from __future__ import annotations

from mhc_dist.model.count import ParameterCount, three_digits


def parameter_table(count: ParameterCount) -> str:
    """One line per component, then the three sums that papers print."""
    sums = {
        "total": (count.total, ""),
        "active": (count.active, "per token: without input embedding and idle experts"),
        "vocab": (count.vocab, "input embedding and output head"),
    }
    rows = [(name.replace("_", " "), number, "") for name, number in count.components().items()]
    rows += [(name, number, note) for name, (number, note) in sums.items()]
    lines = [
        f"{name:<20} {number:>16,} {three_digits(number):>6} {number / count.total:>6.1%}  {note}".rstrip()
        for name, number, note in rows
    ]
    lines.insert(len(rows) - len(sums), "-" * 51)
    return "\n".join(lines)
