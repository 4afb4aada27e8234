"""Inputs of one `cross` on a device, and the same numbers in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.gpu.plan import Case
from mhc_kernels.seam import Connection, Mixing, Seam, SeamBackend


class Problem:
    """Random numbers from a seed. `weights` are the gradients that arrive, made once, so that timings are of
    the seam alone."""

    def __init__(self, case: Case, num_tokens: int, dtype: torch.dtype, device: str) -> None:
        spec, channels = case
        n, m = spec.num_streams, spec.num_coefficients
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int, into: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, into).requires_grad_()

        self.streams_TNC = draw(num_tokens, n, channels, into=dtype)
        self.y_TC = draw(num_tokens, channels, into=dtype)
        self.post_TN = draw(num_tokens, n)
        self.res_TNN = None if spec.mixing is Mixing.IDENTITY else draw(num_tokens, n, n)
        self.carried_TN = draw(num_tokens, n) if spec.shifted_pre else None
        width = n * channels
        self.connection = Connection(
            draw(m, width, scale=width**-0.5), draw(3), draw(m), draw(channels), spec
        )
        shapes = {"streams": self.streams_TNC, "h": self.y_TC, "post": self.post_TN, "res": self.res_TNN}
        self.weights = {
            name: draw(*like.shape, into=like.dtype).detach()
            for name, like in shapes.items()
            if like is not None
        }

    def widened(self) -> Problem:
        wide = object.__new__(Problem)
        wide.streams_TNC, wide.y_TC, wide.post_TN = map(_widen, (self.streams_TNC, self.y_TC, self.post_TN))
        wide.res_TNN = None if self.res_TNN is None else _widen(self.res_TNN)
        wide.carried_TN = None if self.carried_TN is None else _widen(self.carried_TN)
        phi, alpha, bias, gain, spec = self.connection
        wide.connection = Connection(_widen(phi), _widen(alpha), _widen(bias), _widen(gain), spec)
        wide.weights = {name: weight.double() for name, weight in self.weights.items()}
        return wide

    def leaves(self) -> dict[str, Tensor]:
        named = {
            "streams": self.streams_TNC,
            "y": self.y_TC,
            "post": self.post_TN,
            "res": self.res_TNN,
            "pre": self.carried_TN,
            **dict(zip(("phi", "alpha", "bias", "gain"), self.connection[:4], strict=True)),
        }
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def forward(self, backend: SeamBackend) -> Seam:
        return backend.cross(
            self.streams_TNC, self.y_TC, self.post_TN, self.res_TNN, self.connection, self.carried_TN
        )

    def both_ways(self, backend: SeamBackend) -> dict[str, Tensor]:
        """Outputs and, as `d name`, the gradients of all leaves."""
        seam = self.forward(backend)
        made = {
            "streams": seam.streams_TNC,
            "h": seam.h_TC,
            "post": seam.post_TN,
            "res": seam.res_TNN,
        }
        outputs = {name: tensor for name, tensor in made.items() if tensor is not None}
        leaves = self.leaves()
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), list(self.weights.values())
        )
        named = {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: output.detach() for name, output in outputs.items()} | named


def chunked_backend() -> SeamBackend:
    """`triton`, launched in chunks of tokens: only a device can say whether that pays."""
    from mhc_kernels.triton_backend import TritonOperations, check_device

    return FunctionBackend("triton in chunks", TritonOperations(chunked=True), check_device)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """|value - oracle| / |oracle| in the 2-norm; infinite where a value is not finite."""
    error: float = ((value.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")
