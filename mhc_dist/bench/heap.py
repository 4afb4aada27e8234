"""Bytes that this process holds on the heap, as the C library counts them. Linux with glibc only."""

from __future__ import annotations

import ctypes


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    ]  # fmt: skip


def heap_bytes() -> int:
    """Allocated and not yet freed: in arenas, and in maps of their own (large tensors).

    Raises ValueError where the C library cannot tell.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        raise ValueError(
            "this C library has no mallinfo2 (glibc 2.33 or newer): memory cannot be counted here."
        )
    library.mallinfo2.restype = _Mallinfo2
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)
