"""What connections move, as the planner charges it: figures by pencil and paper, and where they come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mhc_kernels import formula
from mhc_kernels.launch.sizes import parameter_splits
from mhc_kernels.spec import ConnectionSpec
from mhc_kernels.tiles import tiles_for

from mhc_dist.config import load_config
from mhc_dist.plan.connection_rows import TILES, connection_work, unfused_connection_work
from mhc_dist.plan.costs import plain_residual

CONFIGS = Path(__file__).parents[3] / "configs"
PLAN_WITHOUT_TORCH = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(("torch", "triton", "deepspeed")))  # None: an import of them fails
import mhc_dist.plan
for module in pkgutil.iter_modules(mhc_dist.plan.__path__):
    importlib.import_module(f"mhc_dist.plan.{module.name}")
from mhc_dist.config import load_config
from mhc_dist.plan.connection_rows import connection_work
print(connection_work(load_config(sys.argv[1])).cross)
"""


@pytest.mark.parametrize(("precision", "item_bytes", "channels"), [("bf16", 2, 64), ("fp32", 4, 32)])
def test_rows_of_the_27b_model(precision: str, item_bytes: int, channels: int) -> None:
    """Oracle: by hand. n = 4, 24 coefficients, C = 2560, 4096 tokens in one launch. B2's programs take 64
    channels, of fp32 streams 32: as many times each token's gradients of post and res are written and read.
    """
    config = load_config(CONFIGS / "paper_27b.yaml", [f"train.precision={precision}"])
    row, phi, tokens = 2560 * item_bytes, 24 * 4 * 2560, 4096
    blocks = 2560 // channels
    splits = {40: 14, 80: 7}[blocks]  # 528 programs, and at least 256 tokens each
    forward = 4 * ((20 + 24 + 24 + 2) + 2 * 2 * 25) + 4 * (phi + 2560 + 27) / tokens
    backward = 4 * ((50 + 26) + (20 + 4 + 3 + 24) + 20 + 2 * blocks * 20 + 4 * 24)
    backward += 4 * (2 * phi + 2 * splits * (phi + 2560) + 2560) / tokens
    work = connection_work(config)
    assert work.cross == pytest.approx(14 + forward / row)
    assert work.enter == pytest.approx(9 + forward / row)
    assert work.cross_backward == pytest.approx(20 + backward / row)
    assert work.enter_backward == pytest.approx(18 + backward / row)
    assert work.recompute == pytest.approx(6 + 4 * (8 + 16 + 1 + 2560 / tokens) / row)
    assert work.projection == 2 * phi


def test_rows_of_the_plain_residual() -> None:
    """Oracle: by hand. x + y and its norm: reads x, y, writes x', h; back: reads their gradients and x',
    writes one gradient, which is x's and y's.
    """
    work = connection_work(plain_residual(load_config(CONFIGS / "paper_27b.yaml")))
    assert (work.cross, work.cross_backward, work.recompute, work.projection) == (4, 4, 0, 0)


@pytest.mark.parametrize("num_streams", [2, 4, 8])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_both_architectures_move_the_same_bytes(num_streams: int, item_bytes: int) -> None:
    """Oracle: the other architecture's tiles: one set stands for all clusters."""
    spec = ConnectionSpec(num_streams=num_streams)

    def moved(architecture: str) -> tuple[formula.Bytes, formula.Bytes]:
        tiles = tiles_for(architecture, num_streams, 2560, item_bytes)
        splits = parameter_splits(4096, num_streams, 2560, tiles)
        return (
            formula.forward(2560, spec, tiles, item_bytes),
            formula.backward(2560, spec, tiles, item_bytes, splits),
        )

    assert moved(TILES) == moved("sm_100")


def test_planning_needs_no_torch() -> None:
    """Oracle: an interpreter in which importing torch, triton or DeepSpeed fails; the rows are this one's."""
    path = CONFIGS / "paper_27b.yaml"
    done = subprocess.run(
        [sys.executable, "-c", PLAN_WITHOUT_TORCH, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == connection_work(load_config(path)).cross


def test_rows_of_plain_hyper_connections() -> None:
    """Oracle: by hand. `hc` has no kernels, so 5n+1 rows are read and 3n+1 written (the paper's table 2), and
    2 by the norm; each of the four streams is multiplied by 4 + 2 columns.
    """
    work = connection_work(load_config(CONFIGS / "paper_27b.yaml", ["residual.kind=hc"]))
    assert (work.cross, work.cross_backward) == (21 + 13 + 2, 72)
    assert work.projection == 2 * 4 * 6 * 2560
    assert work == unfused_connection_work(load_config(CONFIGS / "paper_27b.yaml", ["residual.kind=hc"]))


KROM = ("residual.kind=krom", "kernels.backend=compiled")


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [(KROM, 2 * 4 + 2), (("kernels.backend=compiled",), 24), (("kernels.backend=reference",), 24)],
)
def test_rows_of_connections_without_kernels(overrides: tuple[str, ...], columns: int) -> None:
    """Oracle: by hand, as for `hc`. No kernel makes `krom`'s coefficients: with Triton it is refused. What is
    recomputed is a sublayer's end (x, y in, x' out) and the next one's sum of streams.
    """
    with pytest.raises(ValueError, match="krom has no Triton kernels"):
        load_config(CONFIGS / "paper_27b.yaml", [KROM[0]])
    config = load_config(CONFIGS / "paper_27b.yaml", list(overrides))
    work = connection_work(config)
    assert (work.enter, work.cross, work.leave, work.cross_backward) == (18, 36, 18, 72)
    assert (work.recompute_opened, work.recompute_first, work.recompute) == (5, 14, 14)
    assert work.projection == 2 * 4 * columns * 2560
    assert not work.fused


def test_backends_that_fuse() -> None:
    """Oracle: the kernels' formula, which Triton's bytes equal; blocks of `cpu` stay in the cache."""
    triton, cpu = (
        connection_work(load_config(CONFIGS / "paper_27b.yaml", [f"kernels.backend={backend}"]))
        for backend in ("triton", "cpu")
    )
    assert triton == cpu
    assert triton.fused
