"""How far residual mixes amplify: measured on some tokens of one microbatch, every so many steps.

The Amax gain (mHC paper, section 5.4) of H_res, or of a product of them, is its largest absolute row sum for
a signal going forward and its largest absolute column sum for a gradient going back, averaged over tokens.
Doubly stochastic mixes have gain 1, and so have their products: that is what mHC is for.

Nothing here talks to other ranks. Each pipeline stage measures its own layers on the same tokens, and writes
their products down; whoever reads the logs of all stages multiplies them (`stability_log`).

Shapes: S sampled tokens, n streams (N), C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_dist.model.hyper_connection import Mix, TapeHolder

NUM_SAMPLED_TOKENS = 32
"""Of the first microbatch, evenly spaced. At n = 4 a chunk's product for these is 6 kB in the log."""


class Gain(NamedTuple):
    """1 neither grows nor shrinks."""

    forward: float
    backward: float


def amax_gain(mixes_SNN: Tensor) -> Gain:
    """Largest absolute row and column sum of [out, in] matrices, each averaged over S."""
    return Gain(
        mixes_SNN.sum(2).abs().amax(1).mean().item(),
        mixes_SNN.sum(1).abs().amax(1).mean().item(),
    )


def composite(mixes: Sequence[Tensor]) -> Tensor:
    """Product of the mixes of consecutive sublayers, the first one applied first; (S, n, n)."""
    return reduce(lambda product_SNN, mix_SNN: mix_SNN @ product_SNN, mixes)


class Residual(NamedTuple):
    """Largest distance of a sum from 1, over tokens."""

    rows: float
    columns: float


def stochastic_residual(mixes_SNN: Tensor) -> Residual:
    """How far matrices are from doubly stochastic: what is left after the last Sinkhorn iteration."""
    return Residual(
        (mixes_SNN.sum(2) - 1).abs().max().item(),
        (mixes_SNN.sum(1) - 1).abs().max().item(),
    )


@dataclass(frozen=True)
class Spread:
    """A coefficient over tokens and streams."""

    mean: float
    std: float
    smallest: float
    largest: float

    @staticmethod
    def of(values_SN: Tensor) -> Spread:
        std, mean = torch.std_mean(values_SN, correction=0)
        return Spread(mean.item(), std.item(), values_SN.min().item(), values_SN.max().item())


@dataclass(frozen=True)
class SublayerFigures:
    """One sublayer (0 = first layer's attention). stream_rms: of each stream as it enters, over tokens."""

    sublayer: int
    gain: Gain
    residual: Residual
    pre: Spread
    post: Spread
    stream_rms: list[float]


@dataclass(frozen=True)
class ChunkFigures:
    """A chunk's sublayers, and the product of their mixes for every sampled token, [token][out][in]."""

    chunk: int
    sublayers: list[SublayerFigures]
    product: list[list[list[float]]]


@dataclass(frozen=True)
class StageFigures:
    """What one stage measured in a step.

    gain: of the products of its runs of consecutive chunks, multiplied: a bound for what the stage does to a
    signal, whatever lies between its chunks.
    """

    chunks: list[ChunkFigures]
    gain: Gain
    residual: Residual


class _Seen(NamedTuple):
    """Of the sampled tokens at one sublayer, in the coefficients' dtype."""

    pre_SN: Tensor
    post_SN: Tensor
    res_SNN: Tensor
    rms_N: Tensor


@dataclass
class _ChunkProbe:
    """Takes the first microbatch that passes; later ones, and repetitions by recompute, are let by."""

    seen: dict[int, _Seen] = field(default_factory=dict)

    @torch.no_grad()
    def entered(self, sublayer: int, streams_TNC: Tensor, pre_TN: Tensor, mix: Mix) -> None:
        if sublayer in self.seen:
            return
        num_tokens, n, _ = streams_TNC.shape
        count = min(NUM_SAMPLED_TOKENS, num_tokens)
        index_S = torch.arange(count, device=streams_TNC.device) * num_tokens // count
        assert mix.post_TN is not None
        pre_SN, post_SN = pre_TN[index_S], mix.post_TN[index_S]
        if mix.res_TNN is None:
            res_SNN = torch.eye(n, dtype=pre_SN.dtype, device=pre_SN.device).expand(count, n, n)
        else:
            res_SNN = mix.res_TNN[index_S]
        rms_N = streams_TNC[index_S].float().square().mean((0, 2)).sqrt()
        self.seen[sublayer] = _Seen(pre_SN, post_SN, res_SNN, rms_N)


class StabilityProbe:
    """Measures this rank's chunks in the steps it is armed for.

    holders: by chunk, what the chunk's connections tell of their mixes. every: 0 never measures.
    """

    def __init__(self, holders: Mapping[int, TapeHolder], every: int) -> None:
        self._holders, self._every = dict(sorted(holders.items())), every
        self._probes: dict[int, _ChunkProbe] = {}

    def arm(self, step: int) -> None:
        """Before step `step` (counted from 1): the first step and every multiple of `every` is measured."""
        if self._every and (step == 1 or step % self._every == 0):
            for chunk, holder in self._holders.items():
                holder.probe = self._probes[chunk] = _ChunkProbe()

    def take(self) -> StageFigures | None:
        """What was measured since `arm`; None if nothing was. One host sync per figure."""
        for holder in self._holders.values():
            holder.probe = None
        probes, self._probes = self._probes, {}
        products: dict[int, Tensor] = {}
        chunks = []
        for chunk, probe in probes.items():
            if not probe.seen:
                continue
            # fp64 and on the host: rounding of the instrument must not pass for instability.
            seen = {
                sublayer: _Seen(*(x.detach().double().cpu() for x in probe.seen[sublayer]))
                for sublayer in sorted(probe.seen)
            }
            products[chunk] = composite([one.res_SNN for one in seen.values()])
            sublayers = [_sublayer_figures(sublayer, one) for sublayer, one in seen.items()]
            chunks.append(ChunkFigures(chunk, sublayers, products[chunk].tolist()))
        if not chunks:
            return None
        gains = [amax_gain(product_SNN) for product_SNN in _adjacent(products)]
        residuals = [one.residual for chunk_figures in chunks for one in chunk_figures.sublayers]
        return StageFigures(
            chunks,
            Gain(math.prod(gain.forward for gain in gains), math.prod(gain.backward for gain in gains)),
            Residual(max(one.rows for one in residuals), max(one.columns for one in residuals)),
        )


def _sublayer_figures(sublayer: int, seen: _Seen) -> SublayerFigures:
    return SublayerFigures(
        sublayer,
        amax_gain(seen.res_SNN),
        stochastic_residual(seen.res_SNN),
        Spread.of(seen.pre_SN),
        Spread.of(seen.post_SN),
        seen.rms_N.tolist(),
    )


def _adjacent(products: Mapping[int, Tensor]) -> list[Tensor]:
    """Products of chunks that follow each other, multiplied."""
    runs: list[Tensor] = []
    previous: int | None = None
    for chunk, product_SNN in products.items():
        if previous is not None and chunk == previous + 1:
            runs[-1] = product_SNN @ runs[-1]
        else:
            runs.append(product_SNN)
        previous = chunk
    return runs
