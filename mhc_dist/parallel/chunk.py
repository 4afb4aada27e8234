"""A chunk of the model as phases and exchanges: where the maths meets the pipeline.

Consecutive layers are cut where tokens leave for their experts. Between two such places everything is
local, so one phase holds: the end of the last expert layer (unpermute, streams updated), any dense layers,
attention, and the next router. For the MoE layers k of a chunk, in forward order:

    attention.k   from the chunk's input or the previous experts' answers to the routed rows of layer k
    counts.k      how many rows go where                  (exchange, no gradient)
    dispatch.k    rows to experts                         (exchange)
    shared.k      shared experts: needs no exchange, so it can run while rows fly
    experts.k     routed experts
    combine.k     answers back                            (exchange)

and one last phase `finish` takes the last answers to the chunk's output (streams, or the loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from mhc_kernels.seam import SeamBackend
from torch import Tensor, nn

from mhc_dist.config import RunConfig
from mhc_dist.model.hyper_connection import (
    Carried,
    Entry,
    Mix,
    SublayerConnection,
    TapeHolder,
    attach_holder,
)
from mhc_dist.model.language_model import Embedding, Head
from mhc_dist.model.layer import Layer
from mhc_dist.model.linear import attach_queue
from mhc_dist.model.moe import MixtureOfExperts, permute, plan_rows, unpermute
from mhc_dist.parallel.boundary import pack, unpack
from mhc_dist.parallel.expert_exchange import ArrivalPlan, ExpertExchange, sort_by_expert, sort_by_sender
from mhc_dist.parallel.layout import ChunkPlace, chunk_shape, expert_layers
from mhc_dist.parallel.seam_keeper import SeamKeeper
from mhc_dist.pipeline.action import ItemShape, PhaseShape
from mhc_dist.pipeline.phase import Exchange, Item, Phase, WeightQueue
from mhc_dist.pipeline.streams import HostStreams, Streams


class _Between(NamedTuple):
    """Where a phase stands between two sublayers: streams not yet joined by the last output y."""

    streams_TNC: Tensor
    y_TC: Tensor
    mix: Mix


_Start = Carried | Entry | _Between
"""Streams before a sublayer, a sublayer that has been entered already, or the place between two."""


class ModelChunk(nn.Module):
    """Layers first..last-1 of the model (with this rank's experts), cut into phases.

    Parameter names equal those of `LanguageModel`, so that names are the same on every topology.
    """

    def __init__(
        self,
        config: RunConfig,
        place: ChunkPlace,
        backend: SeamBackend,
        exchange: ExpertExchange,
        expert_rank: int,
        streams: Streams | None = None,
    ) -> None:
        super().__init__()
        self.config, self.place, self.exchange = config, place, exchange
        self.streams = streams or HostStreams()
        self.num_sequences = config.data.sequences_per_microbatch
        num_local = exchange.num_local_experts
        if place.is_first:
            self.embedding = Embedding(config)
        self.layers = nn.ModuleDict(
            {
                str(k): Layer(config, k, backend, expert_rank * num_local, num_local)
                for k in range(place.first_layer, place.last_layer)
            }
        )
        if place.is_last:
            self.head = Head(config)
        self.index = place.index
        self._mix_length = 3 if config.residual.shifted_pre else 2  # of Mix, as `chunk_shape` names its parts
        self.backend = backend
        self.tape_holder = TapeHolder()
        attach_holder(self, self.tape_holder)
        self.weight_queue = WeightQueue()
        attach_queue(self, self.weight_queue)
        self.shape = chunk_shape(config, place)
        self.items: tuple[Item, ...] = tuple(self._item(shape) for shape in self.shape.items)

    def make_keeper(self) -> SeamKeeper | None:
        """What lets this chunk's phases drop streams; None when they drop all or nothing."""
        if self.config.recompute.mode != "mhc":
            return None
        return SeamKeeper(self.backend, self.tape_holder)

    def connections_by_block(self) -> Iterator[list[SublayerConnection]]:
        """The connections in order, those together whose seams are regenerated at once: an expert layer's and
        those of dense layers before it. The others, of dense layers at the end, layer by layer.
        """
        first = self.place.first_layer
        experts = expert_layers(self.config, self.place)
        end = experts[-1] + 1 if experts else first
        for last in [*experts, *range(end, self.place.last_layer)]:
            layers = [self._layer(k) for k in range(first, last + 1)]
            yield [c for layer in layers for c in (layer.attention_connection, layer.feed_forward_connection)]
            first = last + 1

    def _item(self, shape: ItemShape) -> Item:
        kind, _, number = shape.name.partition(".")
        k = int(number) if number else self.place.last_layer
        if isinstance(shape, PhaseShape):
            run: dict[str, Callable[..., tuple[Any, ...]]] = {
                "attention": lambda *values: self._attention(k, values),
                "shared": lambda hidden: (self._moe(k).shared(hidden),),
                "experts": lambda arrived, plan: (self._experts(k, arrived, plan),),
                "finish": self._finish,
            }
            return Phase(shape, run[kind])
        match kind:
            case "counts":
                return Exchange(shape, self.exchange.issue_counts)
            case "dispatch":
                return Exchange(shape, self.exchange.issue_dispatch, self.exchange.issue_dispatch_gradient)
            case "combine":
                return Exchange(shape, self.exchange.issue_combine, self.exchange.issue_combine_gradient)
        raise AssertionError(shape)

    def _layer(self, k: int) -> Layer:
        layer = self.layers[str(k)]
        assert isinstance(layer, Layer)
        return layer

    def _moe(self, k: int) -> Any:
        moe = self._layer(k).feed_forward
        assert isinstance(moe, MixtureOfExperts)
        return moe

    def _attention(self, k: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """From the chunk's input or the previous MoE layer's answers to layer k's rows."""
        start, layer_index = self._begin(values, k)
        entry = self._through(start, layer_index, k)
        moe = self._moe(k)
        routing = moe.router(entry.h_TC)
        plan = plan_rows(routing.expert_TK, self.config.model.num_experts)
        rows_RC = permute(entry.h_TC, plan)
        mix = entry.mix[: self._mix_length]
        return entry.streams_TNC, *mix, entry.h_TC, routing.weight_TK, rows_RC, plan, plan.count_E

    def _experts(self, k: int, arrived_SC: Tensor, plan: ArrivalPlan) -> Tensor:
        rows_SC = self._moe(k).experts(sort_by_expert(arrived_SC, plan), plan.expert_counts)
        return sort_by_sender(rows_SC, plan)

    def _finish(self, *values: Any) -> tuple[Tensor]:
        targets = None
        if self.place.is_last:
            *values, targets = values  # type: ignore[assignment]
        start, layer_index = self._begin(tuple(values), self.place.last_layer)
        carried = self._to_end(start, layer_index)
        if targets is not None:
            return (self.head(carried.streams_TNC, targets),)
        return (pack(carried),)

    def _begin(self, values: tuple[Any, ...], before: int) -> tuple[_Start, int]:
        """What a phase starts from, and the first layer it has to run.

        The answers of experts end the wait for a combine, and all up to the next dispatch depends on them: so
        they rejoin the streams on the urgent stream (mHC paper, 4.3.3).
        """
        if len(values) == 1:
            (received,) = values
            if self.place.is_first:
                return Carried(self.embedding(received)), self.place.first_layer
            return unpack(received, self.config), self.place.first_layer
        previous = max(k for k in expert_layers(self.config, self.place) if k < before)
        return self.streams.urgently(partial(self._rejoin, previous), *values), previous + 1

    def _rejoin(self, k: int, streams_TNC: Tensor, *values: Any) -> Entry | Carried:
        """Post and res of MoE layer k, and the start of the next layer; at the chunk's end, its streams."""
        mix = Mix(*values[: self._mix_length])
        weight_TK, plan, returned_RC, *shared = values[self._mix_length :]
        y_TC = unpermute(returned_RC, weight_TK, plan)
        if shared:
            y_TC = y_TC + shared[0]
        if k + 1 == self.place.last_layer:
            return Carried(self._layer(k).feed_forward_connection.leave(streams_TNC, y_TC, mix), mix.pre_TN)
        return self._layer(k + 1).attention_connection.cross(streams_TNC, y_TC, mix)

    def _through(self, start: _Start, first: int, moe_layer: int) -> Entry:
        """Dense layers first..moe_layer-1, then attention of `moe_layer`, up to its router's input."""
        for k in range(first, moe_layer + 1):
            layer = self._layer(k)
            entry = _enter(layer.attention_connection, start)
            y_TC = layer.attention(entry.h_TC, self.num_sequences)
            entry = layer.feed_forward_connection.cross(entry.streams_TNC, y_TC, entry.mix)
            if k < moe_layer:
                start = _Between(entry.streams_TNC, layer.feed_forward(entry.h_TC), entry.mix)
        return entry

    def _to_end(self, start: _Start, first: int) -> Carried:
        """Remaining dense layers, then the streams as they leave the chunk."""
        last_layer = first - 1
        for k in range(first, self.place.last_layer):
            layer = self._layer(k)
            entry = _enter(layer.attention_connection, start)
            y_TC = layer.attention(entry.h_TC, self.num_sequences)
            entry = layer.feed_forward_connection.cross(entry.streams_TNC, y_TC, entry.mix)
            start = _Between(entry.streams_TNC, layer.feed_forward(entry.h_TC), entry.mix)
            last_layer = k
        if isinstance(start, Carried):
            return start
        assert isinstance(start, _Between), "a layer that was entered is also left"
        return Carried(self._layer(last_layer).feed_forward_connection.leave(*start), start.mix.pre_TN)


def _enter(connection: SublayerConnection, start: _Start) -> Entry:
    match start:
        case Entry():
            return start
        case _Between():
            return connection.cross(*start)
        case Carried():
            return connection.enter(*start)
