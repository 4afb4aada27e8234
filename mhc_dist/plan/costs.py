"""Cost tables from a run, a layout and a cluster: seconds per phase and link. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.parallel.layout import ChunkPlace, expert_layers
from mhc_dist.pipeline.action import CHUNK_INPUT, CHUNK_OUTPUT, PhaseShape
from mhc_dist.pipeline.cost import CostTable, ExchangeCost, MessageCost, PhaseCost
from mhc_dist.plan.charge import Charge
from mhc_dist.plan.cluster import Link
from mhc_dist.plan.connection_rows import ConnectionWork, connection_work, unfused_connection_work
from mhc_dist.plan.kept import Ends, Kept, KeptModel, Seams, phase_bytes
from mhc_dist.plan.layout import Layout, Shapes
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.reduction import gradient_seconds
from mhc_dist.plan.static_memory import MAIN_GRADIENT_BYTES, static_by_rank
from mhc_dist.plan.work import (
    Work,
    attention_work,
    dense_work,
    embedding_gradient_bytes,
    experts_work,
    gathering_work,
    head_work,
    routing_work,
    shared_work,
)

SCORES_BACKWARD = 2.5
"""Operations of attention's backward over its forward: five matrix products instead of two."""

TF32_SHARE = 0.5
"""Of the bf16 rate: what matrix units do in tf32, in which connections multiply bf16 streams by fp32 weights
(data sheets of H100 and B200: 495 of 989 and 1100 of 2250 teraflops, dense)."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a phase consists of: seams at the chunk's start, between sublayers, at its end; and the rest.

    spare: matrices that the rank has for one that a token meets: experts that others' tokens choose.
    """

    seams: Seams
    work: Work
    kept: Kept
    spare: float = 1.0

    @property
    def weights(self) -> float:
        """Parameters of the rank's matrices; a token that meets one costs two operations."""
        return self.work.linear / 2 * self.spare


class CostModel:
    """Costs of `config` on `machine`."""

    def __init__(self, config: RunConfig, machine: Machine) -> None:
        self.config = config
        self.cluster = cluster = machine.cluster
        self.calibration = machine.calibration
        self.num_tokens = config.data.sequence_length * config.data.sequences_per_microbatch
        self.value_bytes = 2 if config.train.precision == "bf16" else 4
        self._kept = KeptModel(config)
        self._precision: Literal["fp32", "bf16"] = config.train.precision
        device = cluster.device
        self._memory_rate = device.memory_bytes_per_second.value * device.memory_efficiency.value

    def table(
        self, layout: Layout, shapes: Shapes, chunk_rank: tuple[int, ...], charge: Charge | None = None
    ) -> CostTable:
        """Costs of every phase and exchange of `shapes` under `layout`."""
        charge = charge or Charge()
        phases: dict[tuple[int, str], PhaseCost] = {}
        exchanges: dict[tuple[int, str], ExchangeCost] = {}
        for place, shape in zip(shapes.places, shapes.chunks, strict=True):
            for item in shape.items:
                if isinstance(item, PhaseShape):
                    phases[place.index, item.name] = self._phase(layout, place, item, charge)
                else:
                    exchanges[place.index, item.name] = self._exchange(layout, item.name)
        costs = CostTable(
            phases=phases,
            exchanges=exchanges,
            message=self._message(layout, charge),
            reduce_seconds=gradient_seconds(self.config, self.cluster, layout, shapes, chunk_rank),
            step_seconds=0.0,
            static_bytes=tuple(
                held.total for held in static_by_rank(self.config, layout, shapes, chunk_rank)
            ),
        )
        return costs if self.calibration is None else self.calibration.apply(costs)

    def _phase(self, layout: Layout, place: ChunkPlace, shape: PhaseShape, charge: Charge) -> PhaseCost:
        parts = self._parts(layout, place, shape)
        work = parts.work
        connection = (connection_work if charge.fused else unfused_connection_work)(self.config)
        timed = connection_work(plain_residual(self.config)) if not charge.kernels else connection
        width, tokens = self.config.model.hidden_size, self.num_tokens
        seams = parts.seams
        crossings = seams.enters + seams.crosses
        rows = seams.enters * timed.enter + seams.crosses * timed.cross + seams.leaves * timed.leave
        rows_backward = (
            seams.enters * timed.enter_backward
            + seams.crosses * timed.cross_backward
            + seams.leaves * timed.leave_backward
        )
        if place.is_first and CHUNK_INPUT in shape.reads:
            rows, rows_backward = rows + timed.expand, rows_backward + timed.expand_backward
        if place.is_last and CHUNK_OUTPUT in shape.writes:
            rows, rows_backward = rows + timed.collapse, rows_backward + timed.collapse_backward
        projection = self._projection_seconds(timed, crossings * tokens, layout)
        scores = self._attention_seconds(work.scores * tokens, layout)
        exact = self._matmul_seconds(work.exact * tokens, layout, "fp32")
        matmul = self._matmul_seconds(work.linear * tokens, layout)
        matmul += self._value_seconds(work.crossing * tokens)
        linear = matmul + self._value_seconds(parts.weights)
        summing = 2 * MAIN_GRADIENT_BYTES * parts.weights / self._memory_rate
        moving = self._value_seconds(tokens * (work.values + rows * width))
        moving_back = self._value_seconds(tokens * (work.values_backward + rows_backward * width))
        if place.is_first and CHUNK_INPUT in shape.reads:
            moving_back += embedding_gradient_bytes(self.config) / self._memory_rate
        forward = linear + exact + scores + moving + projection
        held = phase_bytes(
            self._kept,
            shape,
            parts.seams,
            parts.kept,
            everything=layout.recompute_everything,
            ends=Ends(place.is_first, place.is_last),
        )
        recompute = 0.0
        if shape.drops and charge.recompute and layout.recompute_everything:
            recompute = forward
        elif shape.drops and charge.recompute and crossings:
            first = connection.recompute_opened if seams.enters else connection.recompute_first
            regenerated = first + (crossings - 1) * connection.recompute
            recompute = self._value_seconds(tokens * regenerated * width)
        return PhaseCost(
            forward=forward,
            # Products in fp32 are autograd's, which puts no half of their backward off.
            input_gradient=linear + 2 * exact + SCORES_BACKWARD * scores + moving_back + 2 * projection,
            weight_gradient=matmul + summing if shape.has_weights else 0.0,
            recompute=recompute,
            saved_bytes=round(tokens * held.saved),
            dropped_bytes=round(tokens * held.dropped),
            weight_input_bytes=round(tokens * held.weight_inputs),
            output_gradient_bytes=round(tokens * held.weight_gradients),
            taken_bytes=round(tokens * held.taken),
            left_bytes=round(tokens * held.left),
            gradient_taken_bytes=round(tokens * held.gradients_taken),
            gradient_left_bytes=round(tokens * held.gradients_left),
        )

    def _parts(self, layout: Layout, place: ChunkPlace, shape: PhaseShape) -> _Parts:
        """Which sublayers a phase of `parallel.chunk` runs."""
        config, m = self.config, self.config.model
        kind, _, number = shape.name.partition(".")
        match kind:
            case "experts":
                spare = m.num_experts / m.num_active_experts / layout.expert
                return _Parts(Seams(0, 0, 0), experts_work(config), self._kept.experts(), spare)
            case "shared":
                return _Parts(Seams(0, 0, 0), shared_work(config), self._kept.shared())
        experts_before = [k for k in expert_layers(config, place) if not number or k < int(number)]
        from_input = CHUNK_INPUT in shape.reads
        first = place.first_layer if from_input else experts_before[-1] + 1
        last = place.last_layer if kind == "finish" else int(number)
        work = Work() if from_input else gathering_work(config)
        kept = Kept() if from_input else self._kept.gathering()
        # Every dense layer is two sublayers, and the phase of an expert layer enters both of that layer's.
        sublayers = 2 * (last - first) + (2 if kind == "attention" else 0)
        for _ in range(first, last):
            work = work + attention_work(config) + dense_work(config.model)
            kept = kept + self._kept.attention() + self._kept.dense()
        if kind == "attention":
            work = work + attention_work(config) + routing_work(config)
            kept = kept + self._kept.attention() + self._kept.routing()
        if kind == "finish" and place.is_last:
            work = work + head_work(config)
            kept = kept + self._kept.head()
        enters = int(from_input and sublayers > 0)
        leaves = int(kind == "finish" and (sublayers > 0 or not from_input))
        return _Parts(Seams(enters, sublayers - enters, leaves), work, kept)

    def _exchange(self, layout: Layout, name: str) -> ExchangeCost:
        """All-to-all over the expert group: inside a node as far as it lies there, the rest over the network.

        Groups follow each other through the nodes. Where their size and a node's do not divide each other,
        some straddle nodes, and their members that are most alone are waited for.
        """
        inside = gcd(layout.expert, self.cluster.devices_per_node)
        lane = "node" if inside == layout.expert else "network"
        node, network = self.cluster.node_link, self.cluster.network_link
        latency = network.latency_seconds.value if lane == "network" else node.latency_seconds.value
        if layout.expert == 1:
            return ExchangeCost(0.0, 0.0, "node")
        if name.startswith("counts"):
            # Counts travel, then the host reads them before it can size the rows' exchange.
            return ExchangeCost(2 * latency, 0.0, lane)
        m = self.config.model
        payload = self.num_tokens * m.num_active_experts * m.hidden_size * self.value_bytes
        to_node = payload * (inside - 1) / layout.expert / node.bytes_per_second.value
        to_network = payload * (layout.expert - inside) / layout.expert / network.bytes_per_second.value
        seconds = latency + max(to_node, to_network)
        return ExchangeCost(seconds, seconds, lane, buffer_bytes=payload)

    def _message(self, layout: Layout, charge: Charge) -> MessageCost:
        """Streams of one microbatch to the next pipeline rank, `data` ranks away."""
        if layout.pipeline == 1:
            return MessageCost()
        row_bytes = self.num_tokens * self.config.model.hidden_size * self.value_bytes
        held = row_bytes * self.config.residual.num_streams
        sent = held if charge.streams else row_bytes
        link, lane = self.neighbour_link(layout)
        seconds = link.latency_seconds.value + sent / link.bytes_per_second.value
        return MessageCost(seconds, held, lane)

    def neighbour_link(self, layout: Layout) -> tuple[Link, str]:
        """The slowest link between neighbouring pipeline ranks, which are `data` ranks apart: a full pipeline
        runs at its pace. In a run that spans nodes some neighbours lie in two of them, and all do unless
        `data` is half a node or less.
        """
        if layout.num_devices <= self.cluster.devices_per_node:
            return self.cluster.node_link, "node"
        return self.cluster.network_link, "network"

    def _share(self, layout: Layout) -> float:
        communicates = layout.expert > 1
        return self.cluster.device.compute_share.value if communicates else 1.0

    def _matmul_seconds(
        self, operations: float, layout: Layout, precision: Literal["fp32", "bf16"] | None = None
    ) -> float:
        """Of the matrix units alone: what a product reads and writes is charged beside it."""
        device = self.cluster.device
        rate = self.cluster.matmul_rate(precision or self._precision) * device.matmul_efficiency.value
        return operations / (rate * self._share(layout))

    def _projection_seconds(self, connection: ConnectionWork, num_crossings: int, layout: Layout) -> float:
        """Products with connections' fp32 weights: kernels multiply bf16 streams in tf32. fp32 streams, and
        those that torch multiplies, are multiplied in fp32.
        """
        operations = connection.projection * num_crossings
        if connection.fused and self._precision == "bf16":
            return self._matmul_seconds(operations, layout) / TF32_SHARE
        return self._matmul_seconds(operations, layout, "fp32")

    def _attention_seconds(self, operations: float, layout: Layout) -> float:
        device = self.cluster.device
        rate = self.cluster.matmul_rate(self._precision) * device.attention_efficiency.value
        return operations / (rate * self._share(layout))

    def _value_seconds(self, values: float) -> float:
        return values * self.value_bytes / self._memory_rate


def plain_residual(config: RunConfig) -> RunConfig:
    """The same run with the plain residual, and nothing recomputed."""
    residual = config.residual.model_copy(
        update={"kind": ResidualKind.RESIDUAL, "num_streams": 1, "reduce": "mean"}
    )
    return config.model_copy(update={"residual": residual})
