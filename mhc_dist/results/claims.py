"""Figures beside what was asked of them: holds, falls short and why, or not measured yet."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.results.collection import Collection, NotMeasuredError
from mhc_dist.results.shown import provenance, shown, table
from mhc_dist.results.source import Claim

NO_REASON = "nobody has looked into it yet; where mhc_dist/results/page.yaml was written, it held."


@dataclass(frozen=True)
class Judged:
    """A claim with its figure. holds: None if it was not measured; then `reached` says how to."""

    claim: Claim
    asked: str
    reached: str
    holds: bool | None
    is_certain: bool = True
    """False where the limit lies inside the figure's interval."""

    @property
    def verdict(self) -> str:
        text = {True: "holds", False: "**falls short**", None: "not measured"}[self.holds]
        return text if self.is_certain else f"{text}, uncertain"


def judge(collection: Collection, claim: Claim) -> Judged:
    """Looks the figure up and compares it."""
    asked = _asked(collection, claim)
    try:
        value = _number(collection, claim, claim.value)
        limit = claim.at_most if claim.at_most_figure is None else _limit(collection, claim)
    except NotMeasuredError as error:
        return Judged(claim, asked, str(error), None)
    reached = shown(value, claim.shown)
    ends = [value]
    if claim.interval is not None:
        ends = [float(end) for end in collection.figure(claim.result, claim.interval)]
        reached += f" ({shown(ends[0], claim.shown)} to {shown(ends[1], claim.shown)})"

    def is_met(figure: float) -> bool:
        return figure <= limit if limit is not None else figure >= (claim.at_least or 0.0)

    return Judged(claim, asked, reached, is_met(value), len({is_met(end) for end in ends}) == 1)


def _limit(collection: Collection, claim: Claim) -> float:
    assert claim.at_most_figure is not None
    return _number(collection, claim, claim.at_most_figure)


def _number(collection: Collection, claim: Claim, path: str) -> float:
    """A figure that a command may leave open, such as the noise of a single seed."""
    value = collection.figure(claim.result, path)
    if value is None:
        command = collection.known[claim.result].command
        raise NotMeasuredError(f"left open so far: run `{command}` to the end")
    return float(value)


def _asked(collection: Collection, claim: Claim) -> str:
    if claim.at_least is not None:
        text = f"at least {shown(claim.at_least, claim.shown)}"
    elif claim.at_most is not None:
        text = f"at most {shown(claim.at_most, claim.shown)}"
    else:
        try:
            text = f"at most {shown(_limit(collection, claim), claim.shown)}"
        except NotMeasuredError:
            text = "at most what the same command measures"
    return text if claim.aim is None else f"{text}, aim {claim.aim}"


def claims_table(collection: Collection, judged: list[Judged]) -> str:
    """The claims of a section, reasons below, and where the figures come from."""
    rows = [[j.claim.what, j.asked, j.reached, j.verdict] for j in judged]
    parts = [table(["", "asked", "reached", ""], rows)]
    reasons: dict[str, list[str]] = {}
    for j in judged:
        if j.holds is False:
            reason = collection.filled(j.claim.reason or "") or NO_REASON
            reasons.setdefault(reason, []).append(j.claim.what)
    parts += [f"Falls short ({'; '.join(what)}): {reason}" for reason, what in reasons.items()]
    names = dict.fromkeys(j.claim.result for j in judged if j.holds is not None)
    sources = [
        provenance(file, f"results/{file.path.relative_to(collection.folder)}")
        for name in names
        if (file := collection.get(name)) is not None
    ]
    return "\n\n".join([*parts, "<br>\n".join(sources)] if sources else parts)
