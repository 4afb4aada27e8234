"""Whether variants of a step compute the same gradients, bit for bit, and how many were compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Equality:
    """num_compared: gradients held side by side. different: those that are not equal, by variant and name."""

    num_compared: int = 0
    different: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Nothing compared is nothing shown."""
        return self.num_compared > 0 and not self.different

    def __add__(self, other: Equality) -> Equality:
        return Equality(self.num_compared + other.num_compared, self.different + other.different)

    def figures(self) -> dict[str, bool | int]:
        return {"gradients_bit_equal": self.holds, "gradients_compared": self.num_compared}

    def check(self) -> None:
        """Raise RuntimeError unless it holds: times of steps that compute something else say nothing."""
        if not self.holds:
            what = ", ".join(self.different[:3]) or "none were compared"
            raise RuntimeError(
                f"other gradients ({len(self.different)} of {self.num_compared} compared: {what}), so times"
                " say nothing"
            )


def compared(want: Mapping[str, Tensor], got: Mapping[str, Tensor], who: str) -> Equality:
    """Gradients of variant `who` beside those it should have; one that only one side has is different."""
    names = want.keys() | got.keys()
    different = [
        f"{who}: {name}"
        for name in sorted(names)
        if name not in want or name not in got or not torch.equal(want[name], got[name])
    ]
    return Equality(len(names), tuple(different))


def all_of(equalities: Iterable[Equality]) -> Equality:
    """Several ranks' comparisons as one."""
    return sum(equalities, Equality())
