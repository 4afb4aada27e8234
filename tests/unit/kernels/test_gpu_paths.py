"""What the host does around kernels on a GPU: it never waits for it, and selects the one the tensors are on.

The GPU is played by torch's `meta` device, whose tensors have no values: whatever asks for one raises. They
say that they are on a GPU, and launches are recorded instead of run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from mhc_kernels import ambient, offline, reference, tokens
from mhc_kernels.launch import architecture
from mhc_kernels.launch.backward import seam_backward
from mhc_kernels.launch.ends import collapse_backward, collapse_forward, update_backward, update_forward
from mhc_kernels.launch.forward import seam_forward
from mhc_kernels.launch.mixings import permutations
from mhc_kernels.launch.recompute import recompute_block
from mhc_kernels.seam import Connection, ConnectionSpec, Kept, Mixing, SeamBackend, make_backend
from mhc_kernels.seam_function import SeamGradients, Update
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.kernels.seam_cases import (
    Case,
    chain,
    gradients,
    make_inputs,
    on_device,
    uncompiled_backend,
)


class NoCopyBetweenDevices(TorchDispatchMode):
    """torch waits for these too, but meta tensors allow some."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {a.device for a in (*args, result) if isinstance(a, torch.Tensor)}
            assert len(devices) == 1, f"{func} between {devices}: the host waits"
        return result


@contextlib.contextmanager
def played_gpu() -> Iterator[list[torch.device | None]]:
    """Yields which device was selected at each launch."""
    selected: list[torch.device] = []
    at_launch: list[torch.device | None] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        selected.append(tensor.device)
        yield
        selected.pop()

    def note(*_: Any, **__: Any) -> None:
        at_launch.append(selected[-1] if selected else None)

    with (
        mock.patch.object(torch.cuda, "device_of", device_of),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(architecture, "device_architecture", return_value="sm_90"),
        mock.patch.object(offline.JITFunction, "run", note),
        NoCopyBetweenDevices(),
    ):
        yield at_launch


def fake_context(*saved: torch.Tensor) -> Any:
    return SimpleNamespace(saved_tensors=saved, save_for_backward=lambda *_: None)


def token_work(device: str) -> None:
    expert_TK = torch.zeros(20, 3, dtype=torch.int64, device=device)
    x_TC, weight_TK = torch.zeros(20, 48, device=device), torch.zeros(20, 3, device=device)
    order = tokens.order_by_expert(expert_TK, 8)
    rows_RC = tokens.permute(x_TC, order)
    tokens.unpermute(tokens.swiglu(rows_RC), weight_TK, order)
    tokens._Permute.backward(fake_context(order.place_TK), rows_RC)
    tokens._SwiGlu.backward(fake_context(rows_RC), rows_RC[:, :24])
    saved = fake_context(rows_RC, weight_TK, order.token_R, order.place_TK)
    tokens._Unpermute.backward(saved, x_TC)


def seam_work(spec: ConnectionSpec) -> Callable[[str], None]:
    def work(device: str) -> None:
        t, n, c, m = 130, spec.num_streams, 64, spec.num_coefficients

        def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        x, y, post = some(t, n, c, dtype=torch.bfloat16), some(t, c, dtype=torch.bfloat16), some(t, n)
        update = Update(y, post, None if spec.mixing is Mixing.IDENTITY else some(t, n, n))
        carried = post if spec.shifted_pre else None
        connection = Connection(some(m, n * c), some(3), some(m), some(c), spec)
        for chunk_tokens in (0, 64):
            for tail in (None, update):
                result = seam_forward(x, tail, connection, carried, chunk_tokens)
                arriving = SeamGradients(x, y, carried, post, result.res_TNN)
                seam_backward(x, tail, connection, carried, result.saved, arriving, chunk_tokens)
        update_backward(x, update, update_forward(x, update))
        collapse_backward(x, post, collapse_forward(x, post))
        recompute_block(x, [Kept(post, some(t), some(c), post, update.res_TNN, y)] * 2)

    return work


WORK = {
    "tokens": (token_work, 5),
    "sinkhorn": (seam_work(ConnectionSpec(num_streams=4, shifted_pre=True)), 50),
    "n = 8": (seam_work(ConnectionSpec(num_streams=8)), 50),
    "identity": (seam_work(ConnectionSpec(num_streams=2, mixing=Mixing.IDENTITY)), 40),
}


@pytest.mark.parametrize("name", WORK)
def test_the_host_never_waits_and_launches_on_the_tensors_gpu(name: str) -> None:
    """Oracle: tensors that have no values to wait for. Triton launches on the current GPU, which need not be
    theirs."""
    work, at_least = WORK[name]
    with played_gpu() as at_launch:
        work("meta")
    assert len(at_launch) >= at_least
    assert set(at_launch) == {torch.device("meta")}


@pytest.mark.parametrize(
    ("waiting", "refusal"),
    [
        (lambda x: torch.bincount(x, minlength=8), NotImplementedError),
        (lambda x: x[0].item(), RuntimeError),
        (lambda x: x[x > 2], NotImplementedError),
        (lambda x: x.cpu(), NotImplementedError),
        (lambda x: torch.ones(2).to(x.device), AssertionError),
    ],
    ids=["bincount", "item", "mask", "to the host", "from the host"],
)
def test_waiting_is_noticed(waiting: Callable[[torch.Tensor], object], refusal: type[Exception]) -> None:
    """Oracle: operations known to make the host wait for a GPU; the played one must refuse each, in torch's
    own way for tensors without values, or in this file's for what torch lets pass."""
    with played_gpu():
        x = torch.zeros(20, dtype=torch.int64, device="meta")
        with pytest.raises(refusal, match=r"(?i)meta|host waits"):
            waiting(x)


@pytest.mark.parametrize("mixing", Mixing)
def test_plain_torch_copies_between_devices_in_its_first_seam_alone(mixing: Mixing) -> None:
    """Oracle: tensors that have no values to wait for, through `reference` and the formulas of `compiled`."""
    spec = ConnectionSpec(num_streams=4, mixing=mixing, sinkhorn_iterations=2)
    inputs = on_device(make_inputs(Case(5, 32, spec), torch.float32), "meta")

    def both_ways(backend: SeamBackend) -> None:
        torch.autograd.grad(chain(backend, inputs)[0].sum(), inputs.streams_TNC)

    for backend in (make_backend("reference"), uncompiled_backend()):
        both_ways(backend)
        with played_gpu():
            both_ways(backend)


def test_the_permutations_reach_a_device_once() -> None:
    """Oracle: identity, and the matrices themselves; for kernels padded by zeros."""
    spec, x = ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS), torch.zeros(1)
    first = permutations(spec, x)
    assert first is not None
    assert first is permutations(spec, x)
    assert first.shape == (32, 16)
    assert torch.equal(first[:24], reference.permutation_matrices(4).float().flatten(1))
    assert not first[24:].any()
    reference.permutation_table.cache_clear()
    with torch.inference_mode():
        table = reference.permutation_rows(4, x)
    assert table is reference.permutation_rows(4, x)
    assert not table.is_inference()


def test_an_autocast_region_changes_no_bit() -> None:
    """Oracle: the same outputs and gradients outside of the region, which would round the projection to bf16.
    Of the reference the outputs alone: autograd's own backward obeys the region it runs in."""
    inputs = make_inputs(Case(9, 64, ConnectionSpec(num_streams=4)), torch.float32)
    cpu, plain = make_backend("cpu"), make_backend("reference")

    def results() -> list[torch.Tensor]:
        outputs = [chain(backend, inputs)[0] for backend in (cpu, plain)]
        return [*outputs, *gradients(cpu, inputs).values()]

    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        inside = results()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_tensors_on_cpus_select_no_gpu() -> None:
    """Oracle: a torch without GPUs, where selecting one would raise."""
    assert ambient.on_its_gpu(lambda x: x + 1)(torch.zeros(())) == 1
