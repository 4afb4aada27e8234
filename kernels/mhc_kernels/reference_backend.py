"""`reference`: the plain formulas of reference.py under torch autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_kernels import check, reference
from mhc_kernels.ambient import without_autocast
from mhc_kernels.spec import Connection, Kept, Regenerated, Seam


class ReferenceBackend:
    name = "reference"

    @without_autocast
    def open(self, streams_TNC: Tensor, connection: Connection, pre_TN: Tensor | None = None) -> Seam:
        check.check_streams(streams_TNC)
        check.check_connection(streams_TNC, connection, pre_TN)
        return self._prepare(streams_TNC, connection, pre_TN)

    @without_autocast
    def cross(
        self,
        streams_TNC: Tensor,
        y_TC: Tensor,
        post_TN: Tensor,
        res_TNN: Tensor | None,
        connection: Connection,
        pre_TN: Tensor | None = None,
    ) -> Seam:
        check.check_cross(streams_TNC, y_TC, post_TN, res_TNN, connection, pre_TN)
        return self._prepare(reference.update(streams_TNC, y_TC, post_TN, res_TNN), connection, pre_TN)

    @without_autocast
    def close(self, streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None) -> Tensor:
        check.check_streams(streams_TNC)
        check.check_update(streams_TNC, y_TC, post_TN, res_TNN)
        return reference.update(streams_TNC, y_TC, post_TN, res_TNN)

    @without_autocast
    def collapse(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        check.check_streams(streams_TNC)
        check.check_pre(streams_TNC, pre_TN)
        return reference.collapse(streams_TNC, pre_TN).to(streams_TNC.dtype)

    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
        check.check_block(streams_TNC, kept)
        regenerated: list[Regenerated] = []
        with torch.no_grad():
            for index, sublayer in enumerate(kept):
                u_TC = reference.collapse(streams_TNC, sublayer.pre_TN)
                h_TC = reference.sublayer_input(u_TC, sublayer.rstd_T, sublayer.gain_C, streams_TNC.dtype)
                regenerated.append(Regenerated(streams_TNC, h_TC))
                if index + 1 < len(kept):
                    assert sublayer.y_TC is not None
                    streams_TNC = reference.update(
                        streams_TNC, sublayer.y_TC, sublayer.post_TN, sublayer.res_TNN
                    )
        return regenerated

    def _prepare(self, streams_TNC: Tensor, connection: Connection, carried_pre_TN: Tensor | None) -> Seam:
        spec = connection.spec
        own = reference.connection_coefficients(streams_TNC, connection)
        used_pre_TN = own.pre_TN if carried_pre_TN is None else carried_pre_TN
        u_TC = reference.collapse(streams_TNC, used_pre_TN)
        rstd_T = reference.reciprocal_rms(u_TC, spec.sublayer_norm_eps)
        h_TC = reference.sublayer_input(u_TC, rstd_T, connection.gain_C, streams_TNC.dtype)
        handed_pre_TN = own.pre_TN if spec.shifted_pre else own.pre_TN.detach()
        return Seam(streams_TNC, h_TC, own.post_TN, own.res_TNN, handed_pre_TN, rstd_T.detach())
