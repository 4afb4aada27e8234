"""Payloads between ranks that share a host, through memory that both ends map.

The sender copies into a slot and drops a note into the receiver's pipe; the receiver copies out and sends the
note back. These are the two copies that network cards would make, and nothing else: gloo's way over loopback
has four, in threads whose locks the ranks then wait for while they post their next transfer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_dist.bench.waiting import Waiting

NOTE = struct.Struct("=Biqiqdd")
SMALLEST_SLOT = 4096  # bytes; slots are powers of two
MAX_NOTES = 64  # read at once

RETURNED = 0
"""The kind of a note that gives a slot back; other kinds are the callers'."""


class Note(NamedTuple):
    """What goes with a payload. number: counts what the sender sends to this receiver of this kind, from 0.

    left, seconds: when it left, by the clock that all ranks share, and how long it occupies the link.
    """

    kind: int
    source: int
    number: int
    slot: int
    size: int
    left: float
    seconds: float


@dataclass
class _Slot:
    """Memory for one payload on its way."""

    number: int
    memory: Tensor


class PeerEndedError(RuntimeError):
    """The process that a payload was for is gone."""


class Mailbox:
    """One rank's end of a group's post. Constructing it is collective."""

    def __init__(
        self, folder: Path, store: Any, rank: int, size: int, seconds: float, waiting: Waiting
    ) -> None:
        """folder: of this group alone, in memory if there is such a place; whoever made it removes it.

        store: the group's, to say that this rank is there. seconds: the longest wait for a peer.
        """
        self._folder, self._rank, self._seconds, self._waiting = folder, rank, seconds, waiting
        os.mkfifo(folder / f"inbox_{rank}")
        # Open for writing too, so that it never looks closed while nobody else has it open.
        self._inbox = os.open(folder / f"inbox_{rank}", os.O_RDWR | os.O_NONBLOCK)
        store.set(f"mailbox {rank}", "open")
        store.wait([f"mailbox {other}" for other in range(size)])
        self._ways: dict[int, int] = {}
        self._free: dict[int, list[_Slot]] = {}
        self._lent: dict[tuple[int, int], _Slot] = {}
        self._num_slots = 0
        self._mapped: dict[tuple[int, int], Tensor] = {}
        self._arrived: dict[tuple[int, int, int], Note] = {}

    def put(
        self, to: int, kind: int, number: int, payload: Tensor, left: float = 0.0, seconds: float = 0.0
    ) -> None:
        """Send a contiguous tensor; it may change right afterwards.

        PeerEndedError if the receiver has ended, RuntimeError if it reads no more or nothing has room.
        """
        self._read_notes(0.0)
        payload_bytes = payload.detach().reshape(-1).view(torch.uint8)
        size = payload_bytes.numel()
        slot = self._take_slot(size)
        slot.memory[:size].copy_(payload_bytes)
        self._lent[to, slot.number] = slot
        # Less than a pipe's atomic unit, so notes of several senders do not mix.
        note = NOTE.pack(kind, self._rank, number, slot.number, size, left, seconds)
        self._send(to, note)

    def has(self, source: int, kind: int, number: int) -> bool:
        """Whether that payload can be taken without waiting."""
        self._read_notes(0.0)
        return (kind, source, number) in self._arrived

    def take(self, source: int, kind: int, number: int, result: Tensor) -> Note:
        """Wait for a payload and copy it into a contiguous tensor.

        RuntimeError if nothing comes in time, or if it has another size than `result`.
        """
        key = (kind, source, number)
        deadline = monotonic() + self._seconds
        while key not in self._arrived:
            left = deadline - monotonic()
            if left <= 0:
                raise RuntimeError(
                    f"rank {source} of the group sent nothing for {self._seconds:g} s; waited for its"
                    f" transfer {number}. It is stuck or dead: its own output says where."
                )
            self._read_notes(left)
        note = self._arrived.pop(key)
        result_bytes = result.detach().view(-1).view(torch.uint8)
        if note.size != result_bytes.numel():
            raise RuntimeError(
                f"rank {source} of the group sent {note.size} bytes, but {result_bytes.numel()} were expected"
                f" of its transfer {number}: the ranks disagree about what they exchange."
            )
        result_bytes.copy_(self._memory_of(note)[: note.size])
        # Whoever sent its last payload and ended needs no slot any more.
        with contextlib.suppress(PeerEndedError):
            self._send(source, NOTE.pack(RETURNED, self._rank, 0, note.slot, 0, 0.0, 0.0))
        return note

    def _send(self, to: int, note: bytes) -> None:
        """Never waits: neither for a peer that ended nor for one that reads no more."""
        try:
            if to not in self._ways:
                self._ways[to] = os.open(self._folder / f"inbox_{to}", os.O_WRONLY | os.O_NONBLOCK)
            os.write(self._ways[to], note)
        except BlockingIOError:
            raise RuntimeError(
                f"rank {to} of the group has stopped reading what is sent to it. It is stuck: its own output"
                " says where."
            ) from None
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENXIO):
                raise
            raise PeerEndedError(
                f"rank {to} of the group has ended and takes nothing any more: its own output says why."
            ) from None

    def _read_notes(self, seconds: float) -> None:
        """Whatever the pipe holds, after waiting for the first note at most so long."""
        if seconds > 0:
            self._waiting.for_input(self._inbox, seconds)
        while True:
            try:
                received = os.read(self._inbox, MAX_NOTES * NOTE.size)
            except BlockingIOError:
                return
            for fields in NOTE.iter_unpack(received):
                note = Note(*fields)
                if note.kind == RETURNED:
                    slot = self._lent.pop((note.source, note.slot))
                    self._free.setdefault(slot.memory.numel(), []).append(slot)
                else:
                    self._arrived[note.kind, note.source, note.number] = note

    def _take_slot(self, size: int) -> _Slot:
        """The one returned last, whose memory is still in the caches; a new one if all are under way."""
        capacity = max(SMALLEST_SLOT, 1 << (size - 1).bit_length() if size else 0)
        free = self._free.get(capacity)
        if free:
            return free.pop()
        path = self._slot_path(self._rank, self._num_slots)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        try:
            # Now and not at the first write, where a full file system would be a signal instead of an error.
            os.posix_fallocate(handle, 0, capacity)
        except OSError as error:
            raise RuntimeError(
                f"no room for a payload of {size} bytes in {self._folder} ({error.strerror}). Make room"
                " there; in a container, give it more shared memory (docker run --shm-size=1g)."
            ) from error
        finally:
            os.close(handle)
        slot = _Slot(self._num_slots, _mapped(path))
        self._num_slots += 1
        return slot

    def _memory_of(self, note: Note) -> Tensor:
        key = (note.source, note.slot)
        if key not in self._mapped:
            self._mapped[key] = _mapped(self._slot_path(*key))
        return self._mapped[key]

    def _slot_path(self, rank: int, number: int) -> Path:
        return self._folder / f"slot_{rank}_{number}"


def _mapped(path: Path) -> Tensor:
    size = path.stat().st_size
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
