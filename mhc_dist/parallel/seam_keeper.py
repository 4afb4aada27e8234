"""Selective recompute (mHC paper, 4.3.2): drop the streams and sublayer inputs, keep what regenerates them.

Of every seam the forward makes two large tensors: the streams x_l (T, n, C) and the sublayer's input h_l
(T, C). Both follow from the streams at the start of a block, every sublayer output y_l, and the coefficients
(some 24 numbers a token). So while phases of a block run forward, whatever autograd saves of x_l and h_l is
replaced by a note saying which it was; `regenerate` computes them again, in order from the block's start.

What is kept and regenerated is used on several streams (`pipeline.streams`) and belongs to the one that made
it. It is held until the phase's backward has returned (`forget`), and then compute comes after all of it.

Autograd's saved tensors pass through hooks. A saved tensor is recognised by its storage, so views of h_l (as
linear layers save them) are dropped as well, and weight gradients that were put off find their inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from mhc_kernels.seam import Kept, Seam, SeamBackend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mhc_dist.model.hyper_connection import Mix, TapeHolder, Update
from mhc_dist.pipeline.action import PhaseShape


class _Dropped(NamedTuple):
    """Which tensor it was: the streams after, or the input entered by, seam number `seam` of `phase`."""

    phase: str
    seam: int
    is_streams: bool


@dataclass
class _Slot:
    """A saved tensor, or what is left of it: its place in a tensor that will be regenerated."""

    tensor: Tensor | None
    dropped: _Dropped | None = None
    size: torch.Size | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0

    def drop(self, dropped: _Dropped) -> None:
        assert self.tensor is not None
        self.size, self.stride = self.tensor.size(), tuple(self.tensor.stride())
        self.offset = int(self.tensor.storage_offset())
        self.dropped, self.tensor = dropped, None


@dataclass
class _PhaseTape:
    """The seams of one phase in order, as the forward went through them."""

    streams_before: Tensor | None = None
    first_update: Update | None = None
    kept: list[Kept] = field(default_factory=list)
    seams: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(streams, h) of every seam; forgotten when the phase's forward is over."""

    def seam(self, streams_TNC: Tensor, update: Update | None, seam: Seam, gain_C: Tensor) -> None:
        if not self.kept:
            self.streams_before = streams_TNC.detach()
            self.first_update = None if update is None else _detached(update)
        else:
            assert update is not None, "a chain of seams is opened once"
            self.kept[-1] = self.kept[-1]._replace(y_TC=update.y_TC.detach())
        res_TNN = None if seam.res_TNN is None else seam.res_TNN.detach()
        self.kept.append(
            Kept(
                seam.pre_TN.detach(), seam.rstd_T, gain_C.detach(), seam.post_TN.detach(), res_TNN, y_TC=None
            )
        )
        self.seams.append((seam.streams_TNC.detach(), seam.h_TC.detach()))


class SeamKeeper:
    """The keeper of one microbatch in one chunk.

    Phases are told apart by what they do with seams: those that cross seams (`attention.k`), and those that
    only read what such a phase made (`shared.k` reads its last h, the next phase its last streams).
    """

    def __init__(self, backend: SeamBackend, holder: TapeHolder) -> None:
        self._backend, self._holder = backend, holder
        self._tapes: dict[str, _PhaseTape] = {}
        self._regenerated: dict[_Dropped, Tensor] = {}
        self._last: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Dropped]] = {}
        """Last streams and last h, by storage, that a later phase may save; replaced by the next tape. Not
        held: who reads them holds them, and without a reader (h without shared experts) they are gone."""

    @contextmanager
    def recording(self, phase: PhaseShape) -> Iterator[None]:
        tape, slots = _PhaseTape(), []

        def pack(tensor: Tensor) -> _Slot:
            slots.append(_Slot(tensor))
            return slots[-1]

        self._holder.tape = tape
        try:
            with saved_tensors_hooks(pack, self._unpack):
                yield
        finally:
            self._holder.tape = None
        self._drop(phase, tape, slots)

    def _drop(self, phase: PhaseShape, tape: _PhaseTape, slots: Sequence[_Slot]) -> None:
        droppable: dict[int, _Dropped] = {}
        if phase.recompute_after:
            # A storage's number says nothing once it is gone: others may have it by now.
            droppable = {key: dropped for key, (made, dropped) in self._last.items() if made() is not None}
        name = phase.name
        for index, (streams_TNC, h_TC) in enumerate(tape.seams):
            if index or tape.first_update is not None:  # opening a chain hands back the streams it was given
                droppable[_storage(streams_TNC)] = _Dropped(name, index, is_streams=True)
            droppable[_storage(h_TC)] = _Dropped(name, index, is_streams=False)
        for slot in slots:
            assert slot.tensor is not None
            dropped = droppable.get(_storage(slot.tensor))
            if dropped is not None:
                slot.drop(dropped)
        if not tape.seams:
            return
        if phase.recompute_after:
            tape.streams_before = None  # the phase before it regenerates them
        last = len(tape.seams) - 1
        self._last = {
            _storage(tensor): (weakref.ref(tensor.untyped_storage()), _Dropped(name, last, is_streams))
            for tensor, is_streams in zip(tape.seams[-1], (True, False), strict=True)
        }
        tape.seams.clear()
        self._tapes[name] = tape

    def _unpack(self, slot: _Slot) -> Tensor:
        if slot.dropped is None:
            assert slot.tensor is not None
            return slot.tensor
        base = self._regenerated[slot.dropped]
        assert slot.size is not None
        return base.as_strided(slot.size, slot.stride, slot.offset)

    @torch.no_grad()
    def regenerate(self, phase: PhaseShape) -> None:
        tape = self._tapes.get(phase.name)
        if tape is None:
            return  # it only read what the phase before it regenerates
        streams_TNC = tape.streams_before
        if streams_TNC is None:
            (before,) = phase.recompute_after
            last = len(self._tapes[before].kept) - 1
            streams_TNC = self._regenerated[_Dropped(before, last, is_streams=True)]
        if tape.first_update is not None:
            y_TC, mix = tape.first_update
            assert mix.post_TN is not None
            streams_TNC = self._backend.close(streams_TNC, y_TC, mix.post_TN, mix.res_TNN)
        for index, made in enumerate(self._backend.recompute_block(streams_TNC, tape.kept)):
            self._regenerated[_Dropped(phase.name, index, is_streams=True)] = made.streams_TNC
            self._regenerated[_Dropped(phase.name, index, is_streams=False)] = made.h_TC

    def forget(self, phase: PhaseShape) -> None:
        if self._tapes.pop(phase.name, None) is not None:
            self._regenerated = {
                dropped: tensor
                for dropped, tensor in self._regenerated.items()
                if dropped.phase != phase.name
            }


def _detached(update: Update) -> Update:
    mix = Mix(*(None if tensor is None else tensor.detach() for tensor in update.mix))
    return Update(update.y_TC.detach(), mix)


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
