"""What of hyper-connections a cost table charges for: switched off one by one, it gives the breakdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Charge:
    """kernels: the connections' own kernels instead of the plain residual's. recompute: the time of
    regenerating. streams: n streams instead of one between pipeline ranks. fused: False charges for
    connections that run operation by operation. Memory is always charged.
    """

    kernels: bool = True
    recompute: bool = True
    streams: bool = True
    fused: bool = True
