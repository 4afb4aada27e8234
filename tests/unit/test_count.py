from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mhc_dist.config import load_config
from mhc_dist.model.count import count_parameters, three_digits

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "total", "active", "vocab"),
    [
        ("paper_3b", "2.97B", "612M", "331M"),
        ("paper_9b", "9.18B", "1.66B", "496M"),
        ("paper_27b", "27.0B", "4.14B", "662M"),
    ],
)
def test_paper_models_have_the_published_counts(name: str, total: str, active: str, vocab: str) -> None:
    """Oracle: table 5 of the mHC paper, to the printed digits."""
    count = count_parameters(load_config(CONFIGS / f"{name}.yaml"))
    assert (three_digits(count.total), three_digits(count.active), three_digits(count.vocab)) == (
        total,
        active,
        vocab,
    )


# One layer of each sort, every size a different prime (the width 16 times one, as seams need it), so that a
# swapped pair of factors shows.
C = 16 * 11
SMALL = [
    "model.num_layers=2",
    "model.num_dense_layers=1",
    f"model.hidden_size={C}",
    "model.vocab_size=101",
    "model.num_heads=3",
    "model.head_dim=5",
    "model.value_dim=7",
    "model.rope_dim=2",
    "model.kv_rank=13",
    "model.num_experts=17",
    "model.num_active_experts=2",
    "model.num_shared_experts=3",
    "model.expert_dim=19",
    "model.dense_dim=23",
    "parallel.pipeline=1",
    "parallel.data=1",
    "parallel.expert=1",
]


@pytest.mark.parametrize(
    ("residual", "connection", "stream_head"),
    [
        (["residual.kind=residual", "residual.num_streams=1"], 0, 0),
        (["residual.kind=hc", "residual.num_streams=4"], 6 * C + 24 + 3, 16 * C + 5),
        (["residual.kind=mhc", "residual.num_streams=4"], 24 * 4 * C + 24 + 3, 16 * C + 5),
        (["residual.kind=mhc", "residual.num_streams=2", "residual.reduce=mean"], 8 * 2 * C + 8 + 3, 0),
        (["residual.kind=identity", "residual.num_streams=4", "residual.reduce=sum"], 8 * 4 * C + 8 + 3, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_components_of_a_small_model(residual: list[str], connection: int, stream_head: int) -> None:
    """Oracle: every matrix written out by hand."""
    count = count_parameters(load_config(CONFIGS / "tiny.yaml", SMALL + residual))
    attention = C * 3 * (5 + 2) + C * (13 + 2) + 13 + 13 * 3 * (5 + 7) + 3 * 7 * C
    expert = 3 * C * 19
    assert count.components() == {
        "embedding": 101 * C,
        "attention": 2 * attention,
        "dense_feed_forward": 3 * C * 23,
        "router": 17 * C,
        "routed_experts": 17 * expert,
        "shared_experts": 3 * expert,
        "connections": 4 * connection,
        "norms": 5 * C,
        "stream_head": stream_head,
        "output_head": 101 * C,
    }
    assert count.total - count.active == 101 * C + 15 * expert
    assert count.vocab == 2 * 101 * C


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999"),
        (1_000, "1.00K"),
        (612_345_741, "612M"),
        (999_600_000, "1.00B"),
        (27_048_334_425, "27.0B"),
    ],
)
def test_three_digits(count: int, text: str) -> None:
    """Oracle: how a paper prints the number."""
    assert three_digits(count) == text


def test_counting_needs_no_torch() -> None:
    """Oracle: the modules of a fresh interpreter."""
    code = "import sys, mhc_dist.model.count; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
