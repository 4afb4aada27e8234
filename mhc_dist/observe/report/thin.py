"""Fewer points that look the same: a page about ten thousand steps need not carry ten thousand points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MOST_POINTS = 1200

Values = npt.NDArray[np.float64]
Numbers = Sequence[float] | Values


def thin(steps: Numbers, values: Numbers, most: int = MOST_POINTS) -> tuple[Values, Values]:
    """At most `most` points: of each stretch of steps the lowest and the highest, in order.

    No spike is lost, which a mean would hide. Shorter series are returned as they are.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) <= most:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), most // 2 - 1):
        part = y[stretch]
        if np.isfinite(part).any():
            keep |= {int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])}
    index = np.array(sorted(keep))
    return x[index], y[index]
