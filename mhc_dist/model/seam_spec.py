"""What the kernels are told of a run's hyper-connections. Imports no torch."""

from __future__ import annotations

from mhc_kernels.spec import ConnectionSpec, Mixing

from mhc_dist.config_sections import ModelConfig, ResidualConfig, ResidualKind


def seam_spec(config: ModelConfig, residual: ResidualConfig) -> ConnectionSpec:
    """The numerics of a run's hyper-connections, as the kernels take them."""
    mixing = {
        ResidualKind.MHC: Mixing.SINKHORN,
        ResidualKind.IDENTITY: Mixing.IDENTITY,
        ResidualKind.MHC_LITE: Mixing.PERMUTATIONS,
        ResidualKind.KROM: Mixing.KRONECKER,
    }[residual.kind]
    return ConnectionSpec(
        num_streams=residual.num_streams,
        mixing=mixing,
        sinkhorn_iterations=residual.sinkhorn_iterations,
        sinkhorn_eps=residual.sinkhorn_eps,
        pre_eps=residual.pre_eps,
        projection_norm_eps=config.norm_eps,
        sublayer_norm_eps=config.norm_eps,
        shifted_pre=residual.shifted_pre,
    )
