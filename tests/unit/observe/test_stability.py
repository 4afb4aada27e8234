"""Oracle: sums of matrices written by hand, and the mixes that connections apply."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mhc_kernels.seam import make_backend

from mhc_dist.model.hyper_connection import TapeHolder, attach_holder
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import LanguageModel
from mhc_dist.observe.stability import (
    NUM_SAMPLED_TOKENS,
    StabilityProbe,
    amax_gain,
    composite,
    stochastic_residual,
)
from mhc_dist.observe.stability_log import StabilityLog, composite_gains, stage_lines
from tests.small import random_sequences, small_config


def probed(kind: str, every: int = 3) -> tuple[LanguageModel, StabilityProbe, torch.Tensor]:
    """A model of four layers cut into two chunks of two."""
    config = small_config(model={"num_layers": 4}, residual={"kind": kind, "num_streams": 4})
    model = LanguageModel(config, make_backend("cpu"))
    initialize(model, config)
    holders = {0: TapeHolder(), 1: TapeHolder()}
    for index, layer in enumerate(model.layers):
        attach_holder(layer, holders[index // 2])
    tokens_BL, _ = random_sequences(config)
    return model, StabilityProbe(holders, every), tokens_BL


def test_gain_and_residual_by_hand() -> None:
    """Oracle: rows 3, -1 and columns 1, 1; then rows 2, 2 and columns 4, 0; averaged over both."""
    mixes_SNN = torch.tensor([[[1.0, 2.0], [0.0, -1.0]], [[2.0, 0.0], [2.0, 0.0]]])
    gain = amax_gain(mixes_SNN)
    assert (gain.forward, gain.backward) == ((3 + 2) / 2, (1 + 4) / 2)
    residual = stochastic_residual(mixes_SNN)
    assert (residual.rows, residual.columns) == (2.0, 3.0)


def test_composite_applies_the_first_mix_first() -> None:
    """Oracle: the streams, mixed one after the other."""
    generator = torch.Generator().manual_seed(0)
    mixes = [torch.randn(5, 4, 4, generator=generator) for _ in range(3)]
    streams_TNC = torch.randn(5, 4, 7, generator=generator)
    want = streams_TNC
    for mix_TNN in mixes:
        want = mix_TNN @ want
    torch.testing.assert_close(composite(mixes) @ streams_TNC, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mhc", "hc", "identity"])
def test_probe_sees_what_the_layers_apply(kind: str) -> None:
    """Oracle: each connection asked again for its coefficients on the sampled tokens of the first call."""
    model, probe, tokens_BL = probed(kind)
    probe.arm(3)
    with torch.no_grad():
        model.streams(tokens_BL[:4])
        model.streams(tokens_BL[4:])  # a later microbatch, which is not measured
    figures = probe.take()
    assert figures is not None
    assert [chunk.chunk for chunk in figures.chunks] == [0, 1]
    assert [[one.sublayer for one in chunk.sublayers] for chunk in figures.chunks] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    with torch.no_grad():
        streams_TNC = model.embedding(tokens_BL[:4])
        num_tokens = len(streams_TNC)
        index = torch.arange(NUM_SAMPLED_TOKENS) * num_tokens // NUM_SAMPLED_TOKENS
        product_SNN = torch.eye(4).expand(NUM_SAMPLED_TOKENS, 4, 4)
        for layer, sublayers in zip(
            model.layers[:2], (figures.chunks[0].sublayers[:2], figures.chunks[0].sublayers[2:]), strict=True
        ):
            for connection, function, one in zip(
                (layer.attention_connection, layer.feed_forward_connection),
                (lambda h, layer=layer: layer.attention(h, 4), layer.feed_forward),
                sublayers,
                strict=True,
            ):
                entry = connection.enter(streams_TNC)
                res_SNN = torch.eye(4).expand(NUM_SAMPLED_TOKENS, 4, 4)
                if entry.mix.res_TNN is not None:
                    res_SNN = entry.mix.res_TNN[index]
                assert one.gain == pytest.approx(amax_gain(res_SNN), rel=1e-5)
                assert entry.mix.post_TN is not None
                assert one.post.mean == pytest.approx(entry.mix.post_TN[index].mean().item(), rel=1e-5)
                rms = [streams_TNC[index, stream].square().mean().sqrt().item() for stream in range(4)]
                assert one.stream_rms == pytest.approx(rms, rel=1e-5)
                product_SNN = res_SNN @ product_SNN
                streams_TNC = connection.leave(entry.streams_TNC, function(entry.h_TC), entry.mix)
    np.testing.assert_allclose(figures.chunks[0].product, product_SNN.numpy(), atol=1e-5)
    if kind != "hc":
        assert figures.gain == pytest.approx((1.0, 1.0), abs=2e-2)


def test_only_armed_steps_are_measured_and_nothing_is_kept() -> None:
    """Oracle: the steps that are due: the first and multiples of every."""
    model, probe, tokens_BL = probed("mhc", every=3)
    measured = []
    for step in range(1, 8):
        probe.arm(step)
        with torch.no_grad():
            model.streams(tokens_BL[:1])
        if probe.take() is not None:
            measured.append(step)
    assert measured == [1, 3, 6]
    probe = StabilityProbe({0: TapeHolder()}, every=0)
    probe.arm(1)
    assert probe.take() is None


def test_stages_written_down_multiply_to_the_whole_model(tmp_path: Path) -> None:
    """Oracle: the gain of the product of all mixes, where the stages' chunks lie in a V: 0 and 3, 1 and 2."""
    config = small_config(model={"num_layers": 4}, residual={"kind": "hc", "num_streams": 4})
    model = LanguageModel(config, make_backend("cpu"))
    initialize(model, config)
    with torch.no_grad():
        for layer in model.layers:
            for connection in (layer.attention_connection, layer.feed_forward_connection):
                connection.bias_M[8:] += 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(2))
                connection.theta_MC += 0.5
    holders = [TapeHolder() for _ in range(4)]
    for layer, holder in zip(model.layers, holders, strict=True):
        attach_holder(layer, holder)
    stages = [StabilityProbe({c: holders[c] for c in chunks}, 1) for chunks in ((0, 3), (1, 2))]
    whole = StabilityProbe(dict(enumerate(holders)), 1)
    tokens_BL, _ = random_sequences(config)
    figures = []
    for probe in (*stages, whole):
        probe.arm(1)
        with torch.no_grad():
            model.streams(tokens_BL)
        figures.append(probe.take())
    for stage, measured in enumerate(figures[:2]):
        assert measured is not None
        StabilityLog(tmp_path, stage).write(5, measured)
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "stability").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    expected = figures[2]
    assert expected is not None
    assert expected.gain.forward > 2  # unconstrained and biased: it grows
    gains = composite_gains(lines)
    assert gains["forward"] == {5: pytest.approx(expected.gain.forward, rel=1e-5)}
    assert gains["backward"] == {5: pytest.approx(expected.gain.backward, rel=1e-5)}
    assert composite_gains(lines[:2])["forward"] == {5: pytest.approx(figures[0].gain.forward, rel=1e-5)}  # type: ignore[union-attr]
    assert len(json.dumps(lines[1])) < 2 * 6_500, "two chunks"


def test_a_resumed_log_ends_where_the_checkpoint_was(tmp_path: Path) -> None:
    """Oracle: the steps left in the file; half a line of a killed process is gone."""
    model, probe, tokens_BL = probed("identity", every=1)
    log = StabilityLog(tmp_path, stage=2)
    for step in (1, 2, 3):
        probe.arm(step)
        with torch.no_grad():
            model.streams(tokens_BL[:1])
        figures = probe.take()
        assert figures is not None
        log.write(step, figures)
    path = tmp_path / "stability" / "stage_2.jsonl"
    path.write_text(path.read_text() + '{"kind": "lay')
    StabilityLog(tmp_path, stage=2, last_step=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (1, "layers"),
        (1, "composite"),
        (2, "layers"),
        (2, "composite"),
    ]
    assert lines[-1].keys() == stage_lines(2, 2, figures)[1].keys()
