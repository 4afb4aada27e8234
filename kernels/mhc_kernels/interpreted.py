"""Watch kernels in Triton's interpreter: count bytes, refuse stray accesses, run programs in another order.

Needs a process that imported Triton with TRITON_INTERPRET=1. Every access is attributed to the argument whose
memory it falls into; one that falls outside of all arguments is an error, as is any atomic operation.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter  # type: ignore[import-untyped]

from mhc_kernels.offline import interpreting


@dataclass
class LaunchTraffic:
    """One kernel launch. Keys are argument names (of tuples: name[index])."""

    kernel: str
    constants: dict[str, Any]
    loads: dict[str, np.ndarray[Any, Any]]
    stores: dict[str, np.ndarray[Any, Any]]
    requested_loads: dict[str, int]
    requested_stores: dict[str, int]
    addresses: dict[str, int]
    """First byte of each argument's memory: the same tensor under two names has one address."""

    @staticmethod
    def _bytes(touched: dict[str, np.ndarray[Any, Any]]) -> dict[str, int]:
        return {name: int(bitmap.sum()) for name, bitmap in touched.items() if bitmap.any()}

    @property
    def loaded_bytes(self) -> dict[str, int]:
        """Unique bytes loaded, by argument."""
        return self._bytes(self.loads)

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Unique bytes stored, by argument."""
        return self._bytes(self.stores)


class StrayAccessError(Exception):
    """A kernel touched memory outside of its arguments, or used an atomic operation."""


SECTOR_BYTES = 32
"""What caches exchange with memory: a quarter of a line."""


class CacheModel:
    """A second-level cache of `capacity_bytes`: fully associative, least recently used out first, writes kept
    until they are pushed out. Fed with every access in the order in which programs ask."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes // SECTOR_BYTES
        self._dirty: OrderedDict[int, bool] = OrderedDict()
        self.loaded_bytes = 0
        self.stored_bytes = 0

    def access(self, addresses: np.ndarray[Any, Any], *, store: bool) -> None:
        for sector in np.unique(addresses // SECTOR_BYTES).tolist():
            known = self._dirty.pop(sector, None)
            if known is None and not store:
                self.loaded_bytes += SECTOR_BYTES
            self._dirty[sector] = store or bool(known)
            if len(self._dirty) > self._capacity and self._dirty.popitem(last=False)[1]:
                self.stored_bytes += SECTOR_BYTES

    def flush(self) -> None:
        """Write back what is still dirty."""
        self.stored_bytes += SECTOR_BYTES * sum(self._dirty.values())
        self._dirty.clear()


class TrafficCounter:
    """Collects the traffic of launches; `inside_kernel` while one is being interpreted."""

    def __init__(self, cache: CacheModel | None = None) -> None:
        self.launches: list[LaunchTraffic] = []
        self.cache = cache
        self._ranges: list[tuple[int, int, str]] = []
        self._current: LaunchTraffic | None = None

    @property
    def inside_kernel(self) -> bool:
        return self._current is not None

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        tensors = dict(_named_tensors(arguments))
        self._ranges = [
            (t.data_ptr(), t.data_ptr() + _extent_bytes(t), name) for name, t in tensors.items() if t.numel()
        ]
        bitmaps = [
            {name: np.zeros(stop - start, dtype=bool) for start, stop, name in self._ranges} for _ in range(2)
        ]
        constants = {k: v for k, v in arguments.items() if isinstance(v, (int, float, str, bool))}
        addresses = {name: start for start, _, name in self._ranges}
        self._current = LaunchTraffic(kernel, constants, bitmaps[0], bitmaps[1], {}, {}, addresses)

    def end(self) -> None:
        assert self._current is not None
        self.launches.append(self._current)
        self._current = None

    def access(self, pointers: Any, mask: Any, item_bytes: int, store: bool) -> None:
        assert self._current is not None
        addresses = np.broadcast_to(pointers, np.shape(pointers))[np.asarray(mask, dtype=bool)].ravel()
        if addresses.size == 0:
            return
        if self.cache is not None:
            self.cache.access(addresses, store=store)
        low, high = int(addresses.min()), int(addresses.max())
        for start, stop, name in self._ranges:
            if start <= low and high + item_bytes <= stop:
                bitmap = (self._current.stores if store else self._current.loads)[name]
                requested = self._current.requested_stores if store else self._current.requested_loads
                requested[name] = requested.get(name, 0) + addresses.size * item_bytes
                offsets = (addresses - np.uint64(start)).astype(np.int64)
                for byte in range(item_bytes):
                    bitmap[offsets + byte] = True
                return
        verb = "stores to" if store else "loads from"
        raise StrayAccessError(
            f"{self._current.kernel} {verb} {low:#x}..{high + item_bytes:#x}, outside of its arguments "
            f"{[(name, hex(a), hex(b)) for a, b, name in self._ranges]}"
        )


def _named_tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield f"{name}[{index}]", item


def _extent_bytes(tensor: Tensor) -> int:
    """From the first to the last element, strides included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def require_interpreter() -> None:
    if not interpreting():
        raise ValueError(
            "kernels can be watched in the interpreter only: set TRITON_INTERPRET=1 before the start"
        )


@contextmanager
def counted_traffic(cache: CacheModel | None = None) -> Iterator[TrafficCounter]:
    """Inside, every kernel launch adds its traffic to the counter, and its accesses pass through `cache`."""
    require_interpreter()
    counter = TrafficCounter(cache)
    builder = interpreter.interpreter_builder
    load, store, call = (
        builder.create_masked_load,
        builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        counter.access(
            pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, store=False
        )
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.access(
            pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, store=True
        )
        return store(pointers, value, mask, *rest)

    def refused(*_: Any) -> Any:
        raise StrayAccessError("a kernel used an atomic operation: sums must have a fixed order")

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        counter.begin(self.fn.__name__.removesuffix("_kernel"), arguments)
        call(self, *args, **kwargs)
        counter.end()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, builder.create_atomic_cas = refused, refused
    interpreter.GridExecutor.__call__ = counted_call
    try:
        yield counter
    finally:
        interpreter.GridExecutor.__call__ = call
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
            delattr(builder, name)


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Inside, the programs of every launch run in a random order."""
    require_interpreter()
    builder = interpreter.interpreter_builder
    orders: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    generator = random.Random(seed)
    set_index = builder.set_grid_idx

    def set_shuffled_index(x: int, y: int, z: int) -> None:
        dimensions = tuple(builder.grid_dim)
        if (x, y, z) == (0, 0, 0) or dimensions not in orders:
            places = list(np.ndindex(dimensions))
            generator.shuffle(places)
            orders[dimensions] = places
        set_index(*orders[dimensions][(x * dimensions[1] + y) * dimensions[2] + z])

    builder.set_grid_idx = set_shuffled_index
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextmanager
def rounded_like_a_device() -> Iterator[None]:
    """Inside, fp32 -> bf16 rounds to nearest even as GPUs do; Triton's interpreter cuts bits off."""
    require_interpreter()
    builder = interpreter.interpreter_builder
    truncate = builder.create_fp_trunc

    def round_to_nearest(source: Any, target_type: Any) -> Any:
        result = truncate(source, target_type)
        if source.dtype.scalar.is_fp32() and target_type.scalar.is_bf16():
            data = np.ascontiguousarray(source.data)
            bits = data.view(np.uint32)
            rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            result.data = np.where(np.isfinite(data), rounded, (bits >> 16).astype(np.uint16)).reshape(
                data.shape
            )
        return result

    builder.create_fp_trunc = round_to_nearest
    try:
        yield
    finally:
        del builder.create_fp_trunc


@contextmanager
def products_like_a_matrix_unit() -> Iterator[None]:
    """Inside, products at the precision `tf32` read 11 bits of their operands, the lower ones cut off."""
    require_interpreter()
    builder = interpreter.interpreter_builder
    multiply = builder.create_dot

    def seen(handle: Any) -> Any:
        bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def multiply_seen(a: Any, b: Any, into: Any, precision: Any, *rest: Any) -> Any:
        cut = str(precision).endswith("TF32")
        return multiply(seen(a) if cut else a, seen(b) if cut else b, into, precision, *rest)

    builder.create_dot = multiply_seen
    try:
        yield
    finally:
        del builder.create_dot


class TorchTrafficMode(TorchDispatchMode):
    """Counts bytes moved by torch operations outside of kernels; views and allocations move nothing."""

    FREE = ("view", "empty", "detach", "alias", "as_strided", "slice", "select", "unsqueeze", "expand", "t.")

    def __init__(self, counter: TrafficCounter) -> None:
        super().__init__()
        self.counter = counter
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if (
            not self.counter.inside_kernel
            and not any(name.startswith(free) for free in self.FREE)
            and not _is_view(func)
        ):
            tensors = [a for a in (*args, result) if isinstance(a, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            self.moved[name] = self.moved.get(name, 0) + moved
        return result


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
