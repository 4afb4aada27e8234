"""Initial values that depend on the seed and a parameter's logical name alone.

Every parameter, and every expert of a stacked expert parameter, draws from its own generator. So each rank
fills only what it holds and all topologies start from the same model.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualConfig, ResidualKind
from mhc_dist.model.hyper_connection import HyperConnection, ManifoldConnection, StreamHead
from mhc_dist.model.linear import GroupedLinear
from mhc_dist.model.moe import Experts
from mhc_dist.model.norm import RMSNorm

IDENTITY_LEANING_LOGIT = 4.0
"""Diagonal of b_res for `identity_leaning`: Sinkhorn then keeps exp(4) / (exp(4) + 3) = 0.95 of a stream.

The other kinds keep as much: `mhc_lite` gives the identity permutation that share of the mixture, and each
2x2 factor of `krom` stays with sigmoid(4) = 0.98, three of them together with 0.95.
"""


@torch.no_grad()
def initialize(module: nn.Module, config: RunConfig, prefix: str = "") -> None:
    """Fill all parameters of `module`, whose names start with `prefix` in the whole model."""
    for name, child in module.named_modules():
        path = ".".join(part for part in (prefix, name) if part)
        match child:
            case ManifoldConnection():
                _manifold(child, config.residual, _generator(config.train.seed, path), config.model.init_std)
            case HyperConnection():
                _hyper(child, config.residual)
            case StreamHead():
                _stream_head(child, _generator(config.train.seed, path), config.model.init_std)
            case RMSNorm():
                child.gain.fill_(1.0)
            case Experts():
                _experts(child, config, path)
            case GroupedLinear():
                pass  # filled expert by expert by its Experts
            case _:
                for leaf, parameter in child.named_parameters(recurse=False):
                    _normal(parameter, _generator(config.train.seed, f"{path}.{leaf}"), config.model.init_std)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _normal(tensor: Tensor, generator: torch.Generator, std: float) -> None:
    # Drawn on the CPU in fp32 whatever the device and dtype, so that all of them start from one model.
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)


def _experts(experts: Experts, config: RunConfig, path: str) -> None:
    for local in range(experts.num_experts):
        expert = experts.first_expert + local
        for leaf, linear in (("gate_up", experts.gate_up), ("down", experts.down)):
            generator = _generator(config.train.seed, f"{path}.{expert}.{leaf}.weight")
            _normal(linear.weight[local], generator, config.model.init_std)


def _manifold(
    connection: ManifoldConnection, residual: ResidualConfig, generator: torch.Generator, std: float
) -> None:
    n = residual.num_streams
    _normal(connection.phi_MD, generator, std)
    connection.alpha_3.fill_(residual.alpha_init)
    connection.bias_M.zero_()
    connection.norm_gain.fill_(1.0)
    if residual.init == "identity_leaning":
        bias_res = connection.bias_M[2 * n :]
        match residual.kind:
            case ResidualKind.MHC:
                bias_res.view(n, n).fill_diagonal_(IDENTITY_LEANING_LOGIT)
            case ResidualKind.MHC_LITE:  # the first permutation is the identity
                bias_res[0] = IDENTITY_LEANING_LOGIT + math.log((len(bias_res) - 1) / (n - 1))
            case ResidualKind.KROM:
                bias_res.fill_(IDENTITY_LEANING_LOGIT)
            case _:
                pass  # nothing to lean


def _hyper(connection: HyperConnection, residual: ResidualConfig) -> None:
    n = residual.num_streams
    connection.theta_MC.zero_()
    connection.alpha_3.fill_(residual.alpha_init)
    connection.bias_M.zero_()
    connection.bias_M[connection.sublayer % n] = 1.0
    connection.bias_M[n : 2 * n] = 1.0
    connection.bias_M[2 * n :].view(n, n).fill_diagonal_(1.0)


def _stream_head(head: StreamHead, generator: torch.Generator, std: float) -> None:
    if head.reduce != "learned":
        return
    _normal(head.phi_ND, generator, std)
    head.scale_1.fill_(1.0)
    # sigmoid(b) = 1/n: the head starts as the mean over streams.
    head.bias_N.fill_(-math.log(head.bias_N.numel() - 1))
