"""Allocate results and launch the kernels. Shapes were checked by the backend; nothing here falls back.

Every launch is deterministic: partial results are stored and summed in a fixed order, there are no atomics,
and tiles come from the checked-in table. Programs are short (no persistent grids), so a stream of higher
priority gets multiprocessors soon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.ambient import on_its_gpu
from mhc_kernels.device.backward_apply import backward_apply_kernel
from mhc_kernels.device.backward_dots import backward_dots_kernel
from mhc_kernels.device.backward_phi import backward_phi_kernel
from mhc_kernels.device.backward_streams import backward_streams_kernel
from mhc_kernels.device.mix_pre import mix_pre_kernel
from mhc_kernels.device.post_project import post_project_kernel
from mhc_kernels.device.reduce_partials import reduce_partials_kernel, reduce_rows_kernel
from mhc_kernels.device.streams import (
    post_kernel,
    pre_backward_kernel,
    pre_kernel,
    recompute_block_kernel,
)
from mhc_kernels.formula import TokenSplits
from mhc_kernels.reference import permutation_table
from mhc_kernels.seam_function import InputGradients, SeamForward, SeamGradients, Update
from mhc_kernels.spec import Connection, ConnectionSpec, Kept, Mixing, Regenerated
from mhc_kernels.tiles import CHUNK_MULTIPLE, Tile, TileSet, power_of_two_at_least, tiles_for

MIXING_CODE = {Mixing.SINKHORN: 0, Mixing.IDENTITY: 1, Mixing.PERMUTATIONS: 2}
REDUCE_BLOCK = 1024
REDUCE_ROWS, REDUCE_COLUMNS = 128, 64
"""Tile of sums over many partials of at most REDUCE_BLOCK elements."""
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


def token_splits(num_tokens: int, channels: int, tile: Tile) -> int:
    """How many programs share one block of channels (or columns) in backward_apply and backward_phi."""
    wanted = int(triton.cdiv(PROGRAMS_WANTED, triton.cdiv(channels, tile.channels)))
    return max(1, min(num_tokens // SMALLEST_TOKEN_SPLIT, wanted))


def parameter_splits(num_tokens: int, num_streams: int, channels: int, tiles: TileSet) -> TokenSplits:
    """How many partial sums over tokens there are of dphi and dgain."""
    apply_splits = token_splits(num_tokens, channels, tiles.backward_apply)
    if tiles.backward_phi is None:
        return TokenSplits(apply_splits, apply_splits)
    return TokenSplits(token_splits(num_tokens, num_streams * channels, tiles.backward_phi), apply_splits)


def tokens_per_split(num_tokens: int, splits: int, tile: Tile) -> int:
    """Whole tiles."""
    return int(triton.cdiv(triton.cdiv(num_tokens, splits), tile.tokens) * tile.tokens)


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


def permutations(spec: ConnectionSpec, like: Tensor) -> Tensor | None:
    """(P padded to a power of two, n*n) fp32; None unless mixing=permutations."""
    if spec.mixing is not Mixing.PERMUTATIONS:
        return None
    return permutation_table(spec.num_streams, padded_permutations(spec), torch.float32, like.device)


def padded_permutations(spec: ConnectionSpec) -> int:
    return power_of_two_at_least(spec.num_res_coefficients) if spec.mixing is Mixing.PERMUTATIONS else 1


def token_chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices of at most `chunk_tokens` tokens; one slice when that is 0, none when there are no tokens."""
    step = chunk_tokens or max(1, num_tokens)
    assert step % CHUNK_MULTIPLE == 0 or not chunk_tokens, "a chunk must end where tiles end"
    return [slice(first, min(first + step, num_tokens)) for first in range(0, num_tokens, step)]


@on_its_gpu
def seam_forward(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    chunk_tokens: int = 0,
) -> SeamForward:
    """K1 and K2; with `chunk_tokens` in turn on chunks so short that K2 finds x' in the second-level cache.

    A chunk holds whole tiles, so chunking changes no bit.
    """
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return new_result((num_tokens, *shape), dtype, device)

    result = SeamForward(
        streams_TNC if update is None else new(n, channels, dtype=streams_TNC.dtype),
        new(channels, dtype=streams_TNC.dtype),
        new(n),
        new(n),
        None if spec.mixing is Mixing.IDENTITY else new(n, n),
        new(spec.num_coefficients),
        new(),
        new(),
    )
    update = None if update is None else Update(*(_contiguous(tensor) for tensor in update))
    carried_pre_TN = _contiguous(carried_pre_TN)
    for rows in token_chunks(num_tokens, chunk_tokens):
        _forward_rows(
            streams_TNC[rows],
            None if update is None else Update(*_rows(update, rows)),
            connection,
            _rows([carried_pre_TN], rows)[0],
            SeamForward(*_rows(result, rows)),
        )
    return result


def _forward_rows(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    out: SeamForward,
) -> None:
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(device), n, channels)
    m = spec.num_coefficients
    width = split_channels(channels, tiles)
    splits = triton.cdiv(channels, width)
    partial_STM = new_result((splits, num_tokens, m), torch.float32, device)
    square_ST = new_result((splits, num_tokens), torch.float32, device)
    y_TC, post_TN, res_TNN = update or (None, None, None)
    post_project_kernel[(triton.cdiv(num_tokens, tiles.post_project.tokens), splits)](
        streams_TNC,
        y_TC,
        post_TN,
        res_TNN,
        connection.phi_MD,
        out.streams_TNC,
        partial_STM,
        square_ST,
        num_tokens,
        C=channels,
        N=n,
        M=m,
        M_PAD=padded_coefficients(spec),
        SPLIT_CHANNELS=width,
        HAS_UPDATE=update is not None,
        MIXED=res_TNN is not None,
        PRECISION=product_precision(streams_TNC, tiles),
        BT=tiles.post_project.tokens,
        BC=tiles.post_project.channels,
        num_warps=tiles.post_project.num_warps,
        num_stages=tiles.post_project.num_stages,
    )
    mix_pre_kernel[(triton.cdiv(num_tokens, tiles.mix_pre.tokens),)](
        partial_STM,
        square_ST,
        connection.alpha_3,
        connection.bias_M,
        out.streams_TNC,
        connection.gain_C,
        carried_pre_TN,
        permutations(spec, streams_TNC),
        out.pre_TN,
        out.post_TN,
        out.res_TNN,
        out.mix_TM,
        out.projection_rstd_T,
        out.rstd_T,
        out.h_TC,
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


class _TokenGradients(NamedTuple):
    """Results of B2 that belong to tokens."""

    streams_TNC: Tensor
    y_TC: Tensor | None
    post_TN: Tensor | None
    res_TNN: Tensor | None


class _Behind(NamedTuple):
    """What B2 takes from the sublayer that the seam prepared, and its partial parameter gradients."""

    d_h_TC: Tensor
    gain_C: Tensor
    used_pre_TN: Tensor
    rstd_T: Tensor
    h_dot_T: Tensor
    shrink_T: Tensor
    d_projection_TM: Tensor
    phi_MD: Tensor
    d_phi_SMD: Tensor | None
    d_gain_SC: Tensor


@on_its_gpu
def seam_backward(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    forward: SeamForward,
    gradients: SeamGradients,
    chunk_tokens: int = 0,
) -> InputGradients:
    """B1, B2, B3; with `chunk_tokens` in turn on chunks so short that B2 finds what B1 read in the cache.

    dphi and dgain grow from chunk to chunk in a fixed order, which is another one than without chunks; every
    other gradient is the same, bit for bit.
    """
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(device), n, channels)
    m = spec.num_coefficients
    fp32 = torch.float32
    update = None if update is None else Update(*(_contiguous(tensor) for tensor in update))
    used_pre_TN = forward.pre_TN if carried_pre_TN is None else carried_pre_TN.contiguous()
    d_handed_TN = None if gradients.pre_TN is None else _inner_contiguous(gradients.pre_TN)
    d_post_TN = _inner_contiguous(gradients.post_TN)
    d_res_TK = None if gradients.res_TNN is None else _inner_contiguous(gradients.res_TNN.flatten(1))
    d_used_pre_TN = None if carried_pre_TN is None else new_result((num_tokens, n), fp32, device)
    d_logit_P2M = new_result((triton.cdiv(num_tokens, tiles.backward_dots.tokens), 2, m), fp32, device)
    chunks = token_chunks(num_tokens, chunk_tokens)
    remix = len(chunks) > 1 and update is not None
    splits = parameter_splits(chunk_tokens or num_tokens, n, channels, tiles)
    d_phi_SMD = new_result((splits.phi, m, n * channels), fp32, device)
    d_gain_SC = new_result((splits.gain, channels), fp32, device)
    if not chunks:
        d_phi_SMD.zero_()
        d_gain_SC.zero_()
    out = _new_token_gradients(streams_TNC, update)
    for rows in chunks:
        rows_update = None if update is None else Update(*_rows(update, rows))
        size = rows.stop - rows.start
        d_projection_TM = new_result((size, m), fp32, device)
        shrink_T, h_dot_T = (new_result((size,), fp32, device) for _ in range(2))
        rows_pre, rows_rstd, rows_d_h = used_pre_TN[rows], forward.rstd_T[rows], gradients.h_TC[rows]
        program_rows = slice(rows.start // tiles.backward_dots.tokens, None)
        backward_dots_kernel[(triton.cdiv(size, tiles.backward_dots.tokens),)](
            (streams_TNC if remix else forward.streams_TNC)[rows],
            *((rows_update if remix else None) or (None, None, None)),
            rows_d_h,
            connection.gain_C,
            rows_pre,
            rows_rstd,
            forward.projection_rstd_T[rows],
            forward.mix_TM[rows],
            connection.alpha_3,
            connection.bias_M,
            *_rows([d_handed_TN, d_post_TN, d_res_TK], rows),
            permutations(spec, streams_TNC),
            *_rows([d_used_pre_TN], rows),
            d_projection_TM,
            shrink_T,
            h_dot_T,
            d_logit_P2M[program_rows],
            size,
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
            REMIX=remix,
            MIXED=remix and update is not None and update.res_TNN is not None,
            BT=tiles.backward_dots.tokens,
            BLOCK_C=power_of_two_at_least(channels),
            num_warps=tiles.backward_dots.num_warps,
        )
        _apply(
            streams_TNC[rows],
            rows_update,
            gradients.streams_TNC[rows],
            _Behind(
                *(rows_d_h, connection.gain_C, rows_pre, rows_rstd, h_dot_T, shrink_T, d_projection_TM),
                *(connection.phi_MD, None if tiles.backward_phi else d_phi_SMD, d_gain_SC),
            ),
            splits.gain,
            _TokenGradients(*_rows(out, rows)),
            accumulate=rows.start > 0,
        )
        if tiles.backward_phi is not None:
            _sum_phi(
                *(forward.streams_TNC[rows], d_projection_TM, d_phi_SMD, tiles.backward_phi),
                precision=product_precision(streams_TNC, tiles),
                accumulate=rows.start > 0,
            )
    d_logit_2M = reduce_partials(d_logit_P2M)
    return InputGradients(
        *out,
        d_used_pre_TN,
        reduce_partials(d_phi_SMD),
        torch.stack([part.sum() for part in d_logit_2M[1].tensor_split([n, 2 * n])]),
        d_logit_2M[0],
        reduce_partials(d_gain_SC).to(connection.gain_C.dtype),
    )


def _new_token_gradients(streams_TNC: Tensor, update: Update | None) -> _TokenGradients:
    num_tokens, n, channels = streams_TNC.shape
    device, dtype = streams_TNC.device, streams_TNC.dtype
    mixed = update is not None and update.res_TNN is not None
    return _TokenGradients(
        new_result(streams_TNC.shape, dtype, device),
        None if update is None else new_result((num_tokens, channels), dtype, device),
        None if update is None else new_result((num_tokens, n), torch.float32, device),
        new_result((num_tokens, n, n), torch.float32, device) if mixed else None,
    )


def _apply(
    streams_TNC: Tensor,
    update: Update | None,
    gradient_TNC: Tensor,
    behind: _Behind | None,
    splits: int,
    out: _TokenGradients,
    *,
    accumulate: bool = False,
) -> None:
    """B2 with its token-wise reductions, without dphi where `backward_phi` sums that. `behind` is None at a
    chunk of layers' end."""
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(streams_TNC.device), n, channels)
    tile = tiles.post_backward if behind is None else tiles.backward_apply
    blocks = triton.cdiv(channels, tile.channels)
    y_TC, post_TN, res_TNN = update or (None, None, None)
    d_post_BTN, d_res_BTNN = (
        None if whole is None else new_result((blocks, *whole.shape), torch.float32, whole.device)
        for whole in (out.post_TN, out.res_TNN)
    )
    *through, phi, d_phi, d_gain = behind or (None,) * len(_Behind._fields)
    m = 1 if phi is None else phi.shape[0]
    inputs = (streams_TNC, y_TC, post_TN, res_TNN, gradient_TNC, *through, phi)
    results = (out.streams_TNC, out.y_TC, d_post_BTN, d_res_BTNN)
    sizes = (num_tokens, tokens_per_split(num_tokens, splits, tile))
    constants = {
        "C": channels,
        "N": n,
        "M": m,
        "M_PAD": max(16, power_of_two_at_least(m)),
        "HAS_UPDATE": update is not None,
        "MIXED": res_TNN is not None,
        "ACCUMULATE": accumulate,
        "PRECISION": product_precision(streams_TNC, tiles),
        "BT": tile.tokens,
        "BC": tile.channels,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if behind is not None and tiles.backward_phi is not None:
        backward_streams_kernel[(blocks, splits)](*inputs, *results, d_gain, *sizes, **constants)
    else:
        backward_apply_kernel[(blocks, splits)](
            *inputs, *results, d_phi, d_gain, *sizes, HAS_NEXT=behind is not None, **constants
        )
    for partial, whole in ((d_post_BTN, out.post_TN), (d_res_BTNN, out.res_TNN)):
        if partial is not None:
            reduce_partials(partial, whole)


def _sum_phi(
    streams_TNC: Tensor,
    d_projection_TM: Tensor,
    d_phi_SMD: Tensor,
    tile: Tile,
    *,
    precision: str,
    accumulate: bool,
) -> None:
    """B2b: partial dphi from x' and the gradient of phi x'."""
    num_tokens, n, channels = streams_TNC.shape
    splits, m, width = d_phi_SMD.shape
    backward_phi_kernel[(triton.cdiv(width, tile.channels), splits)](
        streams_TNC,
        d_projection_TM,
        d_phi_SMD,
        num_tokens,
        tokens_per_split(num_tokens, splits, tile),
        D=n * channels,
        M=m,
        M_PAD=max(16, power_of_two_at_least(m)),
        ACCUMULATE=accumulate,
        PRECISION=precision,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def reduce_partials(partial: Tensor, out: Tensor | None = None) -> Tensor:
    """B3: the sum over the first dimension, in a fixed order."""
    size = math.prod(partial.shape[1:])
    if out is None and size <= REDUCE_BLOCK:
        return _reduce_rows(partial)
    if out is None:
        out = new_result(partial.shape[1:], torch.float32, partial.device)
    reduce_partials_kernel[(triton.cdiv(size, REDUCE_BLOCK),)](
        partial, out, partial.shape[0], size, BLOCK=REDUCE_BLOCK, num_warps=4
    )
    return out


def _reduce_rows(partial: Tensor) -> Tensor:
    """The same of few elements: groups of partials side by side, then the groups' sums."""
    while True:
        count, size = partial.shape[0], math.prod(partial.shape[1:])
        groups = max(1, triton.cdiv(count, REDUCE_ROWS))
        out = new_result((groups, *partial.shape[1:]), torch.float32, partial.device)
        grid = (triton.cdiv(size, REDUCE_COLUMNS), groups)
        reduce_rows_kernel[grid](
            partial, out, count, size, ROWS=REDUCE_ROWS, BLOCK=REDUCE_COLUMNS, num_warps=8
        )
        if groups == 1:
            return out[0]
        partial = out


@on_its_gpu
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


@on_its_gpu
def update_backward(
    streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """B2 without a next sublayer."""
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_for(device_architecture(streams_TNC.device), n, channels)
    splits = token_splits(num_tokens, channels, tiles.post_backward)
    out = _new_token_gradients(streams_TNC, update)
    update = Update(*(_contiguous(tensor) for tensor in update))
    if num_tokens:
        _apply(streams_TNC, update, gradient_TNC, None, splits, out)
    assert out.y_TC is not None
    assert out.post_TN is not None
    return out.streams_TNC, out.y_TC, out.post_TN, out.res_TNN


@on_its_gpu
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


@on_its_gpu
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


@on_its_gpu
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


def _rows(tensors: Sequence[Tensor | None], rows: slice) -> tuple[Any, ...]:
    """The rows of every tensor; None stays None."""
    return tuple(None if tensor is None else tensor[rows] for tensor in tensors)


def _contiguous(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous()


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _inner_contiguous(tensor_TK: Tensor) -> Tensor:
    """Rows may be apart (a slice of a wider result); within a row the values must be neighbours."""
    return tensor_TK if tensor_TK.stride(-1) == 1 else tensor_TK.contiguous()
