"""Streams of more than 2^31 elements: every kernel's last program, on memory that is not used otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from mhc_kernels import interpreted
from mhc_kernels.launch import sizes
from mhc_kernels.launch.backward import seam_backward
from mhc_kernels.launch.ends import collapse_backward, collapse_forward, update_backward, update_forward
from mhc_kernels.launch.forward import seam_forward
from mhc_kernels.launch.recompute import recompute_block
from mhc_kernels.offline import seam_tensors
from mhc_kernels.seam import ConnectionSpec, Kept
from mhc_kernels.seam_function import SeamGradients, Update

CHANNELS = 7168
FAR = {4: 293 * 256, 8: 147 * 256}
"""Tokens of n streams: whole smallest splits of tokens, so that the last program has a full one."""


@contextmanager
def last_programs() -> Iterator[None]:
    """Inside, of every launch the last program alone is run, and nothing is copied back and forth."""
    builder, executor = interpreted.interpreter.interpreter_builder, interpreted.interpreter.GridExecutor
    call, set_size, set_index = executor.__call__, builder.set_grid_dim, builder.set_grid_idx

    def call_one(self: Any, *args: Any, **kwargs: Any) -> None:
        whole = (*self.grid, 1, 1)[:3]
        one = executor(self.fn, self.arg_names, (1, 1, 1))
        builder.set_grid_dim = lambda *_: set_size(*whole)
        builder.set_grid_idx = lambda *_: set_index(*(size - 1 for size in whole))
        call(one, *args, **kwargs)
        del builder.set_grid_dim, builder.set_grid_idx

    with (
        mock.patch.object(executor, "__call__", call_one),
        mock.patch.object(executor, "_restore_args_dev"),
    ):
        yield


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("n", [4, 8])
def test_no_offset_is_cut_to_32_bits(n: int) -> None:
    """Oracle: the counter, which refuses an access outside of a kernel's arguments, as one that lost its
    upper bits is; and the last byte of every result of the streams' size, which must have been stored."""
    num_tokens, spec = FAR[n], ConnectionSpec(num_streams=n, sinkhorn_iterations=1)
    x, y, post, res, connection = seam_tensors(num_tokens, CHANNELS, spec, torch.bfloat16)
    assert x.numel() > 2**31
    update = Update(y, post, res)
    with (
        mock.patch.object(sizes, "PROGRAMS_WANTED", 1 << 20),
        interpreted.counted_traffic() as counter,
        last_programs(),
    ):
        forward = seam_forward(x, update, connection, None)
        gradients = SeamGradients(x, y, None, post, res)
        seam_backward(x, update, connection, None, forward.saved, gradients)
        update_backward(x, update, update_forward(x, update))
        collapse_backward(x, post, collapse_forward(x, post))
        kept = Kept(post, forward.rstd_T, connection.gain_C, post, res, y)
        recompute_block(x, [kept, kept])
    stored = {
        (one.kernel, name)
        for one in counter.launches
        for name, touched in one.stores.items()
        if touched.size > 2**31 and touched[-1]
    }
    wider = set() if n == 4 else {("backward_streams", "d_x_ptr"), ("backward_phi", "d_phi_ptr")}
    assert stored == wider | {
        ("post_project", "out_ptr"),
        ("backward_apply", "d_x_ptr"),
        ("post", "out_ptr"),
        ("pre_backward", "d_x_ptr"),
        ("recompute_block", "out_ptrs[0]"),
    }
