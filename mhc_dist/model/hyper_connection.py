"""How sublayers are joined: the residual add and its n-stream relatives.

Shapes: T tokens, n streams (N in suffixes), C hidden size, M coefficients per token.

Every kind speaks of *seams*. Between the functions F_l and F_{l+1} of two sublayers, the streams are updated
with F_l's output and collapsed into F_{l+1}'s normalised input:

    x_{l+1} = H_res x_l + H_post^T F_l(h_l)        h_{l+1} = RMSNorm(H_pre x_{l+1})

A sublayer's connection owns the parameters that produce *its* H_pre, H_post and H_res, and its RMSNorm gain.
`enter` opens a seam-less start (first sublayer), `cross` does a whole seam, `leave` ends a chain. H_post and
H_res travel from a sublayer's entry to its exit as a `Mix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from mhc_kernels.seam import Connection as SeamParameters
from mhc_kernels.seam import Seam, SeamBackend
from torch import Tensor, nn

from mhc_dist.config_sections import ModelConfig, ResidualConfig, ResidualKind
from mhc_dist.model.norm import RMSNorm
from mhc_dist.model.seam_spec import seam_spec


class Mix(NamedTuple):
    """How a sublayer's output rejoins the streams. None stands for the plain add (post) or identity (res).

    pre_TN is the H_pre that this sublayer hands on to the next one, with `residual.shifted_pre` only.
    """

    post_TN: Tensor | None
    res_TNN: Tensor | None
    pre_TN: Tensor | None = None


class Carried(NamedTuple):
    """What goes from layer to layer: the streams, and with `residual.shifted_pre` the H_pre to collapse them.

    At the start of the model there is no H_pre yet: the first sublayer uses its own.
    """

    streams_TNC: Tensor
    pre_TN: Tensor | None = None


class Entry(NamedTuple):
    """What a sublayer starts from: the streams, its normalised input, and how its output will rejoin."""

    streams_TNC: Tensor
    h_TC: Tensor
    mix: Mix


class SeamTape(Protocol):
    """Told of every seam as it is computed, so that someone else can regenerate it."""

    def seam(self, streams_TNC: Tensor, update: Update | None, seam: Seam, gain_C: Tensor) -> None:
        """`streams_TNC` and `update` went in, `seam` came out; `gain_C` is the entered sublayer's.

        `seam.pre_TN` is the H_pre that collapsed the streams.
        """
        ...


class MixProbe(Protocol):
    """Told of every sublayer's coefficients as it is entered, so that someone can measure them."""

    def entered(self, sublayer: int, streams_TNC: Tensor, pre_TN: Tensor, mix: Mix) -> None:
        """`pre_TN` collapsed the streams; `mix` holds None where the kind has no such coefficient."""
        ...


class TapeHolder:
    """The tape that runs and the probe that measures now, if any; shared by the connections of a chunk."""

    def __init__(self) -> None:
        self.tape: SeamTape | None = None
        self.probe: MixProbe | None = None


class Update(NamedTuple):
    """The exit of a sublayer: its output and how that rejoins the streams."""

    y_TC: Tensor
    mix: Mix


class SublayerConnection(nn.Module, ABC):
    """One sublayer's connection."""

    @abstractmethod
    def enter(self, streams_TNC: Tensor, pre_TN: Tensor | None = None) -> Entry:
        """Collapse the streams into the sublayer's input; with `pre_TN`, instead of the sublayer's own."""

    @abstractmethod
    def leave(self, streams_TNC: Tensor, y_TC: Tensor, mix: Mix) -> Tensor:
        """Streams after this sublayer's output y has rejoined."""

    def cross(self, streams_TNC: Tensor, y_TC: Tensor, mix: Mix) -> Entry:
        """Finish the previous sublayer (its y and mix) and enter this one. Fused kinds override this."""
        return self.enter(self.leave(streams_TNC, y_TC, mix), mix.pre_TN)


class PlainResidual(SublayerConnection):
    """x + F(RMSNorm(x)): one stream, the baseline every overhead is measured against."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def enter(self, streams_TNC: Tensor, pre_TN: Tensor | None = None) -> Entry:
        assert pre_TN is None, "one stream has nothing to collapse"
        return Entry(streams_TNC, self.norm(streams_TNC.squeeze(1)), Mix(None, None))

    def leave(self, streams_TNC: Tensor, y_TC: Tensor, mix: Mix) -> Tensor:
        return streams_TNC + y_TC.unsqueeze(1)


class HyperConnection(SublayerConnection):
    """Unconstrained hyper-connection (arXiv:2409.19606; mHC paper eq. 5): shows the instability mHC fixes.

    With x~_i the RMS-normalised stream i: H_pre = a_pre tanh(theta_pre x~) + b_pre, likewise H_post, and
    H_res[o, i] = a_res tanh(theta_res[o] x~_i) + b_res[o, i]. Starts as pre-norm residual: sublayer l reads
    stream l mod n, writes to all streams, and H_res is the identity.
    """

    def __init__(self, config: ModelConfig, residual: ResidualConfig, sublayer: int) -> None:
        super().__init__()
        n = residual.num_streams
        self.sublayer, self.num_streams, self.eps = sublayer, n, config.norm_eps
        self.holder = TapeHolder()
        self.theta_MC = nn.Parameter(torch.empty(2 + n, config.hidden_size))
        self.alpha_3 = nn.Parameter(torch.empty(3))
        self.bias_M = nn.Parameter(torch.empty(2 * n + n * n))
        for parameter in (self.theta_MC, self.alpha_3, self.bias_M):
            parameter.keep_fp32 = True  # type: ignore[attr-defined]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def enter(self, streams_TNC: Tensor, pre_TN: Tensor | None = None) -> Entry:
        assert pre_TN is None, "H_pre of another sublayer has no meaning here"
        n = self.num_streams
        x_TNC = streams_TNC.float()
        normed_TNC = x_TNC * torch.rsqrt(x_TNC.square().mean(-1, keepdim=True) + self.eps)
        dynamic_TNM = torch.tanh(normed_TNC @ self.theta_MC.float().t())
        alpha, bias = self.alpha_3.float(), self.bias_M.float()
        pre_TN = alpha[0] * dynamic_TNM[..., 0] + bias[:n]
        post_TN = alpha[1] * dynamic_TNM[..., 1] + bias[n : 2 * n]
        res_TNN = alpha[2] * dynamic_TNM[..., 2:].transpose(1, 2) + bias[2 * n :].view(n, n)
        collapsed_TC = (pre_TN.unsqueeze(-1) * x_TNC).sum(1).to(streams_TNC.dtype)
        mix = Mix(post_TN, res_TNN)
        if self.holder.probe is not None:
            self.holder.probe.entered(self.sublayer, streams_TNC, pre_TN, mix)
        return Entry(streams_TNC, self.norm(collapsed_TC), mix)

    def leave(self, streams_TNC: Tensor, y_TC: Tensor, mix: Mix) -> Tensor:
        assert mix.post_TN is not None
        assert mix.res_TNN is not None
        mixed_TNC = (mix.res_TNN.unsqueeze(-1) * streams_TNC.float().unsqueeze(1)).sum(2)
        return (mixed_TNC + mix.post_TN.unsqueeze(-1) * y_TC.float().unsqueeze(1)).to(streams_TNC.dtype)


class ManifoldConnection(SublayerConnection):
    """mHC (paper eq. 7-9) and its kin with another H_res or none: all kinds that the seam kernels know."""

    def __init__(
        self, config: ModelConfig, residual: ResidualConfig, sublayer: int, backend: SeamBackend
    ) -> None:
        super().__init__()
        self.sublayer = sublayer
        self.spec = seam_spec(config, residual)
        self.backend = backend
        self.holder = TapeHolder()
        self.phi_MD = nn.Parameter(
            torch.empty(self.spec.num_coefficients, residual.num_streams * config.hidden_size)
        )
        self.alpha_3 = nn.Parameter(torch.empty(3))
        self.bias_M = nn.Parameter(torch.empty(self.spec.num_coefficients))
        self.norm_gain = nn.Parameter(torch.empty(config.hidden_size))
        for parameter in (self.phi_MD, self.alpha_3, self.bias_M):
            parameter.keep_fp32 = True  # type: ignore[attr-defined]

    def seam_parameters(self) -> SeamParameters:
        return SeamParameters(
            self.phi_MD.float(), self.alpha_3.float(), self.bias_M.float(), self.norm_gain, self.spec
        )

    def enter(self, streams_TNC: Tensor, pre_TN: Tensor | None = None) -> Entry:
        seam = self.backend.open(streams_TNC, self.seam_parameters(), pre_TN)
        return self._entry(streams_TNC, None, seam, pre_TN)

    def cross(self, streams_TNC: Tensor, y_TC: Tensor, mix: Mix) -> Entry:
        assert mix.post_TN is not None
        seam = self.backend.cross(
            streams_TNC, y_TC, mix.post_TN, mix.res_TNN, self.seam_parameters(), mix.pre_TN
        )
        return self._entry(streams_TNC, Update(y_TC, mix), seam, mix.pre_TN)

    def _entry(
        self, streams_TNC: Tensor, update: Update | None, seam: Seam, carried_TN: Tensor | None
    ) -> Entry:
        used = seam if carried_TN is None else seam._replace(pre_TN=carried_TN)
        mix = Mix(seam.post_TN, seam.res_TNN, seam.pre_TN if self.spec.shifted_pre else None)
        if self.holder.tape is not None:
            self.holder.tape.seam(streams_TNC, update, used, self.norm_gain)
        if self.holder.probe is not None:
            self.holder.probe.entered(self.sublayer, seam.streams_TNC, used.pre_TN, mix)
        return Entry(seam.streams_TNC, seam.h_TC, mix)

    def leave(self, streams_TNC: Tensor, y_TC: Tensor, mix: Mix) -> Tensor:
        assert mix.post_TN is not None
        return self.backend.close(streams_TNC, y_TC, mix.post_TN, mix.res_TNN)


def attach_holder(module: nn.Module, holder: TapeHolder) -> None:
    """Let all connections of `module` that know tapes or probes use those of `holder`."""
    for child in module.modules():
        if isinstance(child, ManifoldConnection | HyperConnection):
            child.holder = holder


def make_connection(
    config: ModelConfig, residual: ResidualConfig, sublayer: int, backend: SeamBackend
) -> SublayerConnection:
    """The connection of sublayer `sublayer` (0 = first layer's attention)."""
    match residual.kind:
        case ResidualKind.RESIDUAL:
            return PlainResidual(config)
        case ResidualKind.HC:
            return HyperConnection(config, residual, sublayer)
        case ResidualKind.MHC | ResidualKind.IDENTITY | ResidualKind.MHC_LITE | ResidualKind.KROM:
            return ManifoldConnection(config, residual, sublayer, backend)


def expand(embedded_TC: Tensor, num_streams: int) -> Tensor:
    """Start of the model: every stream is the embedding, (T, C) -> (T, n, C) contiguous."""
    return embedded_TC.unsqueeze(1).repeat(1, num_streams, 1)


class StreamHead(nn.Module):
    """End of the model: n streams to one, then the final RMSNorm.

    `learned` weighs the streams per token with sigmoids of a projection of all streams (DeepSeek-V4's head);
    `mean` and `sum` have no parameters.
    """

    def __init__(self, config: ModelConfig, residual: ResidualConfig) -> None:
        super().__init__()
        n = residual.num_streams
        self.reduce = residual.reduce if n > 1 else "sum"
        self.norm_eps, self.pre_eps = config.norm_eps, residual.pre_eps
        if self.reduce == "learned":
            self.phi_ND = nn.Parameter(torch.empty(n, n * config.hidden_size))
            self.scale_1 = nn.Parameter(torch.empty(1))
            self.bias_N = nn.Parameter(torch.empty(n))
            for parameter in (self.phi_ND, self.scale_1, self.bias_N):
                parameter.keep_fp32 = True  # type: ignore[attr-defined]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, streams_TNC: Tensor) -> Tensor:
        x_TNC = streams_TNC.float()
        if self.reduce == "learned":
            flat_TD = x_TNC.flatten(1)
            inverse_rms_T1 = torch.rsqrt(flat_TD.square().mean(-1, keepdim=True) + self.norm_eps)
            logits_TN = self.scale_1.float() * (flat_TD @ self.phi_ND.float().t()) * inverse_rms_T1
            weight_TN = torch.sigmoid(logits_TN + self.bias_N.float()) + self.pre_eps
            x_TC = (weight_TN.unsqueeze(-1) * x_TNC).sum(1)
        else:
            x_TC = x_TNC.mean(1) if self.reduce == "mean" else x_TNC.sum(1)
        h_TC: Tensor = self.norm(x_TC.to(streams_TNC.dtype))
        return h_TC
