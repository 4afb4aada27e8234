"""The public face of the package: types of the seam and the choice of a backend.

backend = make_backend("reference")
seam = backend.open(streams_TNC, connections[0])
for l in range(1, num_sublayers):
    y_TC = functions[l - 1](seam.h_TC)
    seam = backend.cross(seam.streams_TNC, y_TC, seam.post_TN, seam.res_TNN, connections[l])
streams_TNC = backend.close(seam.streams_TNC, functions[-1](seam.h_TC), seam.post_TN, seam.res_TNN)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mhc_kernels.compiled_operations import CompiledOperations, why_unavailable
from mhc_kernels.cpu_operations import CpuOperations
from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.reference_backend import ReferenceBackend
from mhc_kernels.spec import Connection, ConnectionSpec, Kept, Mixing, Regenerated, Seam, SeamBackend

BackendName = Literal["reference", "cpu", "compiled", "triton"]
BACKEND_NAMES: tuple[BackendName, ...] = ("reference", "cpu", "compiled", "triton")

__all__ = [
    "BACKEND_NAMES",
    "BackendName",
    "Connection",
    "ConnectionSpec",
    "Kept",
    "Mixing",
    "Regenerated",
    "Seam",
    "SeamBackend",
    "make_backend",
]


def make_backend(name: BackendName) -> SeamBackend:
    """The named backend; one that cannot run here raises ValueError. Nothing is replaced silently."""
    match name:
        case "reference":
            return ReferenceBackend()
        case "cpu":
            return FunctionBackend("cpu", CpuOperations(), _check_on_cpu)
        case "compiled":
            reason = why_unavailable()
            if reason is not None:
                raise ValueError(f"kernel backend `compiled` cannot run here: {reason}")
            return FunctionBackend("compiled", CompiledOperations(), lambda _: None)
        case "triton":
            # Imported here: a process on CPUs has no use for Triton and its start costs a second.
            from mhc_kernels import triton_backend

            reason = triton_backend.why_unavailable()
            if reason is not None:
                raise ValueError(f"kernel backend `triton` cannot run here: {reason}")
            return FunctionBackend("triton", triton_backend.TritonOperations(), triton_backend.check_device)
    raise ValueError(f"kernel backend {name!r} is unknown: use one of {', '.join(BACKEND_NAMES)}")


def _check_on_cpu(streams_TNC: Tensor) -> None:
    if streams_TNC.device.type != "cpu":
        raise ValueError(
            f"streams_TNC is on {streams_TNC.device}, backend `cpu` runs on CPUs only: use `triton`"
        )
