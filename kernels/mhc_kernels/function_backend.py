"""A SeamBackend over SeamOperations: checks arguments, applies the shared autograd Functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from mhc_kernels import check
from mhc_kernels.seam_function import CollapseFunction, SeamOperations, Update, UpdateFunction, run_seam
from mhc_kernels.spec import Connection, Kept, Regenerated, Seam


class RecomputingOperations(SeamOperations, Protocol):
    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]: ...


class FunctionBackend:
    """`check_device` raises ValueError when the streams lie where the operations cannot run."""

    def __init__(
        self, name: str, operations: RecomputingOperations, check_device: Callable[[Tensor], None]
    ) -> None:
        self.name = name
        self._operations = operations
        self._check_device = check_device

    def open(self, streams_TNC: Tensor, connection: Connection, pre_TN: Tensor | None = None) -> Seam:
        self._check_device(streams_TNC)
        check.check_streams(streams_TNC)
        check.check_connection(streams_TNC, connection, pre_TN)
        return run_seam(self._operations, streams_TNC, None, connection, pre_TN)

    def cross(
        self,
        streams_TNC: Tensor,
        y_TC: Tensor,
        post_TN: Tensor,
        res_TNN: Tensor | None,
        connection: Connection,
        pre_TN: Tensor | None = None,
    ) -> Seam:
        self._check_device(streams_TNC)
        check.check_cross(streams_TNC, y_TC, post_TN, res_TNN, connection, pre_TN)
        return run_seam(self._operations, streams_TNC, Update(y_TC, post_TN, res_TNN), connection, pre_TN)

    def close(self, streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None) -> Tensor:
        self._check_device(streams_TNC)
        check.check_streams(streams_TNC)
        check.check_update(streams_TNC, y_TC, post_TN, res_TNN)
        return cast(Tensor, UpdateFunction.apply(self._operations, streams_TNC, y_TC, post_TN, res_TNN))

    def collapse(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        self._check_device(streams_TNC)
        check.check_streams(streams_TNC)
        check.check_pre(streams_TNC, pre_TN)
        return cast(Tensor, CollapseFunction.apply(self._operations, streams_TNC, pre_TN))

    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
        self._check_device(streams_TNC)
        check.check_block(streams_TNC, kept)
        with torch.no_grad():
            return self._operations.recompute_block(streams_TNC, kept)
