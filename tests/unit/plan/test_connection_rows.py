"""What connections move, as the planner charges it, against the kernels' own formula and against pencil and
paper.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mhc_kernels import formula
from mhc_kernels.launch.sizes import parameter_splits
from mhc_kernels.spec import ConnectionSpec, Mixing
from mhc_kernels.tiles import tiles_for

from mhc_dist.config import load_config
from mhc_dist.plan.connection_rows import connection_work
from mhc_dist.plan.costs import plain_residual

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["paper_3b", "paper_9b", "paper_27b"])
@pytest.mark.parametrize(
    ("kind", "streams", "mixing"),
    [("mhc", 4, Mixing.SINKHORN), ("mhc", 8, Mixing.SINKHORN), ("identity", 2, Mixing.IDENTITY)],
)
def test_rows_are_the_kernels_bytes(name: str, kind: str, streams: int, mixing: Mixing) -> None:
    """Oracle: `mhc_kernels.formula`, which equals the counted bytes; a microbatch is one launch."""
    settings = [f"residual.kind={kind}", f"residual.num_streams={streams}"]
    config = load_config(CONFIGS / f"{name}.yaml", settings)
    width, tokens = config.model.hidden_size, config.data.sequence_length
    spec = ConnectionSpec(num_streams=streams, mixing=mixing)
    tiles = tiles_for("sm_90", streams, width)
    splits = parameter_splits(tokens, streams, width, tiles)

    def rows(moved: formula.Bytes) -> float:
        return (moved.per_token + moved.constants / tokens) / (2 * width)

    work = connection_work(config)
    assert work.cross == pytest.approx(rows(formula.forward(width, spec, tiles, 2)), rel=2e-3)
    assert work.cross_backward == pytest.approx(
        rows(formula.backward(width, spec, tiles, 2, splits)), rel=2e-3
    )
    assert work.recompute == pytest.approx(rows(formula.recompute(width, spec, 2)), rel=2e-3)


def test_rows_of_the_plain_residual() -> None:
    """Oracle: by hand. x + y and its norm: reads x, y, writes x', h; back: reads their gradients and x',
    writes one gradient, which is x's and y's.
    """
    work = connection_work(plain_residual(load_config(CONFIGS / "paper_27b.yaml")))
    assert (work.cross, work.cross_backward, work.recompute, work.projection) == (4, 4, 0, 0)
