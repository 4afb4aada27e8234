"""Allocate results and launch the kernels. Shapes were checked by the backend; nothing here falls back.

Every launch is deterministic: partial results are stored and summed in a fixed order, there are no atomics,
and tiles come from the checked-in table. Programs are short (no persistent grids), so a stream of higher
priority gets multiprocessors soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.device.backward_apply import backward_apply_kernel
from mhc_kernels.device.backward_dots import backward_dots_kernel
from mhc_kernels.device.mix_pre import mix_pre_kernel
from mhc_kernels.device.post_project import post_project_kernel
from mhc_kernels.device.reduce_partials import reduce_partials_kernel
from mhc_kernels.device.streams import (
    post_kernel,
    pre_backward_kernel,
    pre_kernel,
    recompute_block_kernel,
)
from mhc_kernels.reference import permutation_matrices
from mhc_kernels.seam_function import InputGradients, SeamForward, SeamGradients, Update
from mhc_kernels.spec import Connection, ConnectionSpec, Kept, Mixing, Regenerated
from mhc_kernels.tiles import TileSet, power_of_two_at_least, tiles_for

MIXING_CODE = {Mixing.SINKHORN: 0, Mixing.IDENTITY: 1, Mixing.PERMUTATIONS: 2}
REDUCE_BLOCK = 1024
PROGRAMS_WANTED = 528
"""Programs that backward_apply aims for: four per multiprocessor of the largest supported devices."""
SMALLEST_TOKEN_SPLIT = 256
"""Below this many tokens per split, the partial dphi would outweigh what the split reads."""


def new_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a kernel's result; the tests replace this by NaN-filled memory."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


cpu_architecture: ContextVar[str] = ContextVar("cpu_architecture", default="sm_90")
"""Whose tiles kernels on CPU tensors take: they are interpreted, or recorded to be compiled offline."""


def device_architecture(device: torch.device) -> str:
    """Name of the device in the tile table."""
    if device.type == "cpu":
        return cpu_architecture.get()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def token_splits(num_tokens: int, channels: int, tiles: TileSet) -> int:
    """How many programs share one channel block in backward_apply."""
    channel_blocks = triton.cdiv(channels, tiles.backward_apply.channels)
    wanted = int(triton.cdiv(PROGRAMS_WANTED, channel_blocks))
    return max(1, min(num_tokens // SMALLEST_TOKEN_SPLIT, wanted))


def padded_coefficients(spec: ConnectionSpec) -> int:
    return max(16, power_of_two_at_least(spec.num_coefficients))


def split_channels(channels: int, tiles: TileSet) -> int:
    """Channels per split of post_project, a multiple of its tile."""
    width = tiles.post_project.channels
    return int(triton.cdiv(triton.cdiv(channels, tiles.project_splits), width) * width)


def product_precision(streams_TNC: Tensor, tiles: TileSet) -> str:
    return tiles.precision if streams_TNC.dtype == torch.bfloat16 else "ieee"


def mixing_code(spec: ConnectionSpec) -> int:
    """Raises ValueError for a mixing that the kernels do not have."""
    if spec.mixing not in MIXING_CODE:
        raise ValueError(
            f"mixing={spec.mixing} has no Triton kernels: use one of {', '.join(MIXING_CODE)}, or another"
            " backend"
        )
    return MIXING_CODE[spec.mixing]


def permutation_table(spec: ConnectionSpec, like: Tensor) -> Tensor | None:
    """(P padded to a power of two, n*n) fp32; None unless mixing=permutations."""
    if spec.mixing is not Mixing.PERMUTATIONS:
        return None
    table_PNN = permutation_matrices(spec.num_streams)
    padded = torch.zeros(padded_permutations(spec), spec.num_streams**2, dtype=torch.float32)
    padded[: len(table_PNN)] = table_PNN.flatten(1)
    return padded.to(like.device)


def padded_permutations(spec: ConnectionSpec) -> int:
    return power_of_two_at_least(spec.num_res_coefficients) if spec.mixing is Mixing.PERMUTATIONS else 1


def seam_forward(
    streams_TNC: Tensor, update: Update | None, connection: Connection, carried_pre_TN: Tensor | None
) -> SeamForward:
    """K1 and K2."""
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(device), n, channels)
    m = spec.num_coefficients
    fp32 = torch.float32
    out_TNC = streams_TNC if update is None else new_result(streams_TNC.shape, streams_TNC.dtype, device)
    width = split_channels(channels, tiles)
    splits = triton.cdiv(channels, width)
    partial_STM = new_result((splits, num_tokens, m), fp32, device)
    square_ST = new_result((splits, num_tokens), fp32, device)
    if num_tokens:
        post_project_kernel[(triton.cdiv(num_tokens, tiles.post_project.tokens), splits)](
            streams_TNC,
            None if update is None else update.y_TC.contiguous(),
            None if update is None else update.post_TN.contiguous(),
            None if update is None or update.res_TNN is None else update.res_TNN.contiguous(),
            connection.phi_MD,
            out_TNC,
            partial_STM,
            square_ST,
            num_tokens,
            C=channels,
            N=n,
            M=m,
            M_PAD=padded_coefficients(spec),
            SPLIT_CHANNELS=width,
            HAS_UPDATE=update is not None,
            MIXED=update is not None and update.res_TNN is not None,
            PRECISION=product_precision(streams_TNC, tiles),
            BT=tiles.post_project.tokens,
            BC=tiles.post_project.channels,
            num_warps=tiles.post_project.num_warps,
        )
    h_TC = new_result((num_tokens, channels), streams_TNC.dtype, device)
    pre_TN, post_TN = (new_result((num_tokens, n), fp32, device) for _ in range(2))
    res_TNN = None if spec.mixing is Mixing.IDENTITY else new_result((num_tokens, n, n), fp32, device)
    mix_TM = new_result((num_tokens, m), fp32, device)
    rstd_x_T, rstd_h_T = (new_result((num_tokens,), fp32, device) for _ in range(2))
    if num_tokens:
        mix_pre_kernel[(triton.cdiv(num_tokens, tiles.mix_pre.tokens),)](
            partial_STM,
            square_ST,
            connection.alpha_3,
            connection.bias_M,
            out_TNC,
            connection.gain_C,
            None if carried_pre_TN is None else carried_pre_TN.contiguous(),
            permutation_table(spec, streams_TNC),
            pre_TN,
            post_TN,
            res_TNN,
            mix_TM,
            rstd_x_T,
            rstd_h_T,
            h_TC,
            num_tokens,
            spec.pre_eps,
            spec.sinkhorn_eps,
            spec.projection_norm_eps,
            spec.sublayer_norm_eps,
            C=channels,
            N=n,
            M=m,
            SPLITS=splits,
            MIXING=mixing_code(spec),
            ITERATIONS=spec.sinkhorn_iterations,
            P_PAD=padded_permutations(spec),
            CARRIED=carried_pre_TN is not None,
            BT=tiles.mix_pre.tokens,
            BLOCK_C=power_of_two_at_least(channels),
            num_warps=tiles.mix_pre.num_warps,
        )
    return SeamForward(out_TNC, h_TC, pre_TN, post_TN, res_TNN, mix_TM, rstd_x_T, rstd_h_T)


def seam_backward(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    forward: SeamForward,
    gradients: SeamGradients,
) -> InputGradients:
    """B1, B2, B3."""
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(device), n, channels)
    m = spec.num_coefficients
    fp32 = torch.float32
    used_pre_TN = forward.pre_TN if carried_pre_TN is None else carried_pre_TN.contiguous()
    d_handed_TN = None if gradients.pre_TN is None else _inner_contiguous(gradients.pre_TN)
    d_post_TN = _inner_contiguous(gradients.post_TN)
    d_res_TK = None if gradients.res_TNN is None else _inner_contiguous(gradients.res_TNN.flatten(1))
    programs = triton.cdiv(num_tokens, tiles.backward_dots.tokens)
    d_used_pre_TN = None if carried_pre_TN is None else new_result((num_tokens, n), fp32, device)
    d_projection_TM = new_result((num_tokens, m), fp32, device)
    shrink_T, h_dot_T = (new_result((num_tokens,), fp32, device) for _ in range(2))
    d_logit_P2M = new_result((programs, 2, m), fp32, device)
    if num_tokens:
        backward_dots_kernel[(programs,)](
            forward.streams_TNC,
            gradients.h_TC,
            connection.gain_C,
            used_pre_TN,
            forward.rstd_T,
            forward.projection_rstd_T,
            forward.mix_TM,
            connection.alpha_3,
            connection.bias_M,
            d_handed_TN,
            d_post_TN,
            d_res_TK,
            permutation_table(spec, streams_TNC),
            d_used_pre_TN,
            d_projection_TM,
            shrink_T,
            h_dot_T,
            d_logit_P2M,
            num_tokens,
            0 if d_handed_TN is None else d_handed_TN.stride(0),
            d_post_TN.stride(0),
            0 if d_res_TK is None else d_res_TK.stride(0),
            spec.sinkhorn_eps,
            C=channels,
            N=n,
            M=m,
            MIXING=mixing_code(spec),
            ITERATIONS=spec.sinkhorn_iterations,
            P_PAD=padded_permutations(spec),
            CARRIED=carried_pre_TN is not None,
            HANDED=d_handed_TN is not None,
            BT=tiles.backward_dots.tokens,
            BLOCK_C=power_of_two_at_least(channels),
            num_warps=tiles.backward_dots.num_warps,
        )
    splits = token_splits(num_tokens, channels, tiles)
    d_phi_SMD = new_result((splits, m, n * channels), fp32, device)
    d_gain_SC = new_result((splits, channels), fp32, device)
    applied = _apply(
        streams_TNC,
        update,
        gradients.streams_TNC,
        (gradients.h_TC, connection.gain_C, used_pre_TN, forward.rstd_T, h_dot_T, shrink_T, d_projection_TM),
        connection,
        (d_phi_SMD, d_gain_SC),
        splits,
    )
    d_logit_2M = reduce_partials(d_logit_P2M)
    d_alpha_3 = torch.stack([part.sum() for part in d_logit_2M[1].tensor_split([n, 2 * n])])
    return InputGradients(
        *applied,
        d_used_pre_TN,
        reduce_partials(d_phi_SMD),
        d_alpha_3,
        d_logit_2M[0],
        reduce_partials(d_gain_SC).to(connection.gain_C.dtype),
    )


def _apply(
    streams_TNC: Tensor,
    update: Update | None,
    gradient_TNC: Tensor,
    behind: Sequence[Tensor],
    connection: Connection | None,
    partial_parameter_gradients: Sequence[Tensor],
    splits: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """B2 with its token-wise reduction. `behind` and `connection` are empty at a chunk's end."""
    num_tokens, n, channels = streams_TNC.shape
    device = streams_TNC.device
    tiles = tiles_for(device_architecture(device), n, channels)
    mixed = update is not None and update.res_TNN is not None
    tile = tiles.post_backward if connection is None else tiles.backward_apply
    blocks = triton.cdiv(channels, tile.channels)
    d_streams_TNC = new_result(streams_TNC.shape, streams_TNC.dtype, device)
    d_y_TC = d_post_BTN = d_res_BTNN = None
    if update is not None:
        d_y_TC = new_result((num_tokens, channels), streams_TNC.dtype, device)
        d_post_BTN = new_result((blocks, num_tokens, n), torch.float32, device)
    if mixed:
        d_res_BTNN = new_result((blocks, num_tokens, n, n), torch.float32, device)
    d_h, gain, used_pre, rstd, h_dot, shrink, d_projection = behind or (None,) * 7
    d_phi, d_gain = partial_parameter_gradients or (None,) * 2
    spec = None if connection is None else connection.spec
    backward_apply_kernel[(blocks, splits)](
        streams_TNC,
        None if update is None else update.y_TC.contiguous(),
        None if update is None else update.post_TN.contiguous(),
        None if update is None or update.res_TNN is None else update.res_TNN.contiguous(),
        gradient_TNC,
        d_h,
        gain,
        used_pre,
        rstd,
        h_dot,
        shrink,
        d_projection,
        None if connection is None else connection.phi_MD,
        d_streams_TNC,
        d_y_TC,
        d_post_BTN,
        d_res_BTNN,
        d_phi,
        d_gain,
        num_tokens,
        triton.cdiv(triton.cdiv(num_tokens, splits), tile.tokens) * tile.tokens,
        C=channels,
        N=n,
        M=1 if spec is None else spec.num_coefficients,
        M_PAD=16 if spec is None else padded_coefficients(spec),
        HAS_UPDATE=update is not None,
        HAS_NEXT=connection is not None,
        MIXED=mixed,
        PRECISION=product_precision(streams_TNC, tiles),
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return (
        d_streams_TNC,
        d_y_TC,
        None if d_post_BTN is None else reduce_partials(d_post_BTN),
        None if d_res_BTNN is None else reduce_partials(d_res_BTNN),
    )


def reduce_partials(partial: Tensor) -> Tensor:
    """B3: the sum over the first dimension, in order."""
    out = new_result(partial.shape[1:], torch.float32, partial.device)
    size = out.numel()
    reduce_partials_kernel[(triton.cdiv(size, REDUCE_BLOCK),)](
        partial, out, partial.shape[0], size, BLOCK=REDUCE_BLOCK, num_warps=4
    )
    return out


def update_forward(streams_TNC: Tensor, update: Update) -> Tensor:
    """K3."""
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_for(device_architecture(streams_TNC.device), n, channels).streams
    out_TNC = new_result(streams_TNC.shape, streams_TNC.dtype, streams_TNC.device)
    if num_tokens:
        post_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(channels, tile.channels))](
            streams_TNC,
            update.y_TC.contiguous(),
            update.post_TN.contiguous(),
            None if update.res_TNN is None else update.res_TNN.contiguous(),
            out_TNC,
            num_tokens,
            C=channels,
            N=n,
            MIXED=update.res_TNN is not None,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return out_TNC


def update_backward(
    streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """B2 without a next sublayer."""
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(streams_TNC.device), n, channels)
    splits = token_splits(num_tokens, channels, tiles)
    d_streams_TNC, d_y_TC, d_post_TN, d_res_TNN = _apply(
        streams_TNC, update, gradient_TNC, (), None, (), splits
    )
    assert d_y_TC is not None
    assert d_post_TN is not None
    return d_streams_TNC, d_y_TC, d_post_TN, d_res_TNN


def collapse_forward(streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
    """K4."""
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_for(device_architecture(streams_TNC.device), n, channels).streams
    out_TC = new_result((num_tokens, channels), streams_TNC.dtype, streams_TNC.device)
    if num_tokens:
        pre_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(channels, tile.channels))](
            streams_TNC,
            pre_TN.contiguous(),
            out_TC,
            num_tokens,
            C=channels,
            N=n,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return out_TC


def collapse_backward(streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_for(device_architecture(streams_TNC.device), n, channels).mix_pre
    d_streams_TNC = new_result(streams_TNC.shape, streams_TNC.dtype, streams_TNC.device)
    d_pre_TN = new_result((num_tokens, n), torch.float32, streams_TNC.device)
    if num_tokens:
        pre_backward_kernel[(triton.cdiv(num_tokens, tile.tokens),)](
            streams_TNC,
            pre_TN.contiguous(),
            gradient_TC,
            d_streams_TNC,
            d_pre_TN,
            num_tokens,
            C=channels,
            N=n,
            BT=tile.tokens,
            BLOCK_C=power_of_two_at_least(channels),
            num_warps=tile.num_warps,
        )
    return d_streams_TNC, d_pre_TN


def recompute_block(streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
    """R: all sublayers of the block in one launch."""
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_for(device_architecture(streams_TNC.device), n, channels).streams
    device, dtype = streams_TNC.device, streams_TNC.dtype
    inner = kept[:-1]
    h_LTC = [new_result((num_tokens, channels), dtype, device) for _ in kept]
    out_LTNC = [new_result(streams_TNC.shape, dtype, device) for _ in inner]
    mixed = bool(inner) and inner[0].res_TNN is not None
    if num_tokens:
        recompute_block_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(channels, tile.channels))](
            streams_TNC,
            tuple(_present(sublayer.y_TC).contiguous() for sublayer in inner),
            tuple(sublayer.pre_TN.contiguous() for sublayer in kept),
            tuple(sublayer.rstd_T for sublayer in kept),
            tuple(sublayer.gain_C for sublayer in kept),
            tuple(sublayer.post_TN.contiguous() for sublayer in inner),
            tuple(_present(sublayer.res_TNN).contiguous() for sublayer in inner) if mixed else (),
            tuple(h_LTC),
            tuple(out_LTNC),
            num_tokens,
            L=len(kept),
            C=channels,
            N=n,
            MIXED=mixed,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return [Regenerated(x_TNC, h_TC) for x_TNC, h_TC in zip([streams_TNC, *out_LTNC], h_LTC, strict=True)]


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _inner_contiguous(tensor_TK: Tensor) -> Tensor:
    """Rows may be apart (a slice of a wider result); within a row the values must be neighbours."""
    return tensor_TK if tensor_TK.stride(-1) == 1 else tensor_TK.contiguous()
