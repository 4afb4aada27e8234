"""Residual kinds by their names in the configuration: what they compute, start from, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import ConfigError, RunConfig, load_config
from mhc_dist.config_sections import ResidualConfig, ResidualKind
from mhc_dist.model.coefficients import num_mixed, num_projected
from mhc_dist.model.hyper_connection import ManifoldConnection
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import LanguageModel
from mhc_dist.model.seam_spec import seam_spec
from mhc_dist.optim.parameter_groups import cast_to_bf16
from tests.small import random_sequences, small_config

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
STREAMS = {"mhc": (2, 4, 8), "identity": (2, 4, 8), "mhc_lite": (2, 4), "krom": (2, 4, 8)}


def model_of(residual: dict[str, Any], backend: str) -> tuple[RunConfig, LanguageModel]:
    config = small_config(model={"num_layers": 3}, residual=residual)
    model = LanguageModel(config, make_backend(backend))  # type: ignore[arg-type]
    initialize(model, config)
    return config, model


def mixes(model: LanguageModel, config: RunConfig) -> list[Tensor]:
    """H_res of the first sublayer on random streams."""
    streams_TNC = torch.randn(16, config.residual.num_streams, config.model.hidden_size)
    entry = model.layers[0].attention_connection.enter(streams_TNC)
    assert entry.mix.res_TNN is not None
    return list(entry.mix.res_TNN)


@pytest.mark.parametrize(("kind", "streams"), [(k, n) for k, counts in STREAMS.items() for n in counts])
def test_coefficients_are_counted_as_the_kernels_have_them(kind: str, streams: int) -> None:
    """Oracle: ConnectionSpec, which sizes the parameters."""
    config = small_config(residual={"kind": kind, "num_streams": streams})
    spec = seam_spec(config.model, config.residual)
    assert num_projected(config.residual) == spec.num_coefficients
    res = 0 if kind == "identity" else streams * streams
    assert num_mixed(config.residual) == 2 * streams + res


@pytest.mark.parametrize("kind", ["hc", "mhc", "identity", "mhc_lite", "krom"])
def test_coefficients_stay_fp32_where_weights_are_bf16(kind: str) -> None:
    """Oracle: the names of a connection's own parameters; near 1 bf16 is too coarse to learn."""
    _, model = model_of({"kind": kind, "num_streams": 4}, "cpu")
    cast_to_bf16(model)
    connection = model.layers[0].attention_connection
    kept = {name for name, parameter in connection.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"theta_MC" if kind == "hc" else "phi_MD", "alpha_3", "bias_M"}


def test_the_plain_residual_computes_none() -> None:
    """Oracle: nothing is nothing."""
    residual = ResidualConfig(kind=ResidualKind.RESIDUAL, num_streams=1)
    assert (num_projected(residual), num_mixed(residual)) == (0, 0)


@pytest.mark.parametrize("init", ["identity_leaning", "paper_zero_bias"])
@pytest.mark.parametrize(("kind", "streams"), [("mhc", 4), ("mhc_lite", 4), ("krom", 8)])
def test_initial_mixes(kind: str, streams: int, init: str) -> None:
    """Oracle: rows and columns sum to 1; leaning keeps about 0.95 of a stream, zero bias 1/n."""
    config, model = model_of(
        {"kind": kind, "num_streams": streams, "init": init, "alpha_init": 0.01}, "reference"
    )
    # Twenty iterations of Sinkhorn near the identity are not at their end; the others are exact.
    allowed = 2e-4 if kind == "mhc" else 2e-6
    for res_NN in mixes(model, config):
        for dim in (0, 1):
            torch.testing.assert_close(res_NN.sum(dim), torch.ones(streams), rtol=0, atol=allowed)
        expected = 0.95 if init == "identity_leaning" else 1 / streams
        torch.testing.assert_close(res_NN.diagonal(), torch.full((streams,), expected), rtol=0, atol=0.02)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("kind", "streams"), [("mhc", 4), ("identity", 4), ("mhc_lite", 4), ("krom", 8)])
def test_cpu_backend_has_the_gradients_of_the_reference(kind: str, streams: int, shifted: bool) -> None:
    """Oracle: autograd through the plain formulas, for loss and every parameter of a whole model."""
    residual = {"kind": kind, "num_streams": streams, "shifted_pre": shifted, "alpha_init": 0.5}
    gradients: list[dict[str, Tensor]] = []
    for backend in ("reference", "cpu"):
        config, model = model_of(residual, backend)
        tokens_BL, targets_BL = (part[:2] for part in random_sequences(config))
        loss = model(tokens_BL, targets_BL)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({"loss": loss.detach(), **found})
    want, got = gradients
    assert got.keys() == want.keys()
    total = torch.stack([gradient.norm() for gradient in want.values()]).norm().item()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * total, name


def test_shifted_pre_collapses_with_the_mix_before() -> None:
    """Oracle: the update written out by hand from each connection's own coefficients."""
    config, model = model_of({"kind": "mhc", "shifted_pre": True, "alpha_init": 0.5}, "reference")
    layer = model.layers[0]
    first, second = layer.attention_connection, layer.feed_forward_connection
    assert isinstance(first, ManifoldConnection)
    assert isinstance(second, ManifoldConnection)
    streams_TNC = torch.randn(12, 4, config.model.hidden_size)
    entry = first.enter(streams_TNC)
    own_TN = entry.mix.pre_TN
    assert own_TN is not None
    y_TC = layer.attention(entry.h_TC, 1)
    following = second.cross(entry.streams_TNC, y_TC, entry.mix)
    collapsed_TC = (own_TN.unsqueeze(-1) * following.streams_TNC).sum(1)
    normed = collapsed_TC * torch.rsqrt(collapsed_TC.square().mean(-1, keepdim=True) + config.model.norm_eps)
    torch.testing.assert_close(following.h_TC, normed)
    # What is handed on is the second connection's own, of the new streams.
    alone = second.enter(following.streams_TNC)
    assert alone.mix.pre_TN is not None
    assert following.mix.pre_TN is not None
    torch.testing.assert_close(following.mix.pre_TN, alone.mix.pre_TN)
    assert not torch.allclose(alone.h_TC, following.h_TC, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["residual.kind=mhc_lite", "residual.num_streams=8"], ["2, 4 streams", "num_streams=8"]),
        (["residual.kind=krom", "residual.num_streams=3"], ["2, 4, 8 streams", "num_streams=3"]),
        (["residual.kind=krom", "kernels.backend=triton"], ["krom has no Triton", "kernels.backend to cpu"]),
        (
            ["residual.kind=hc", "residual.shifted_pre=true"],
            ["shifted_pre=true", "mhc_lite, krom"],
        ),
        (["residual.shifted_pre=1"], ["true or false"]),
        (["residual.num_streams=true"], ["a number or a word"]),
        (["residual.kind=hc", "recompute.mode=mhc"], ["residual.kind=hc", "recompute.mode to full"]),
    ],
)
def test_what_cannot_be_run_is_refused(changes: list[str], parts: list[str]) -> None:
    """Oracle: numbers and remedy in the message."""
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, changes)
    for part in parts:
        assert part in str(caught.value)
