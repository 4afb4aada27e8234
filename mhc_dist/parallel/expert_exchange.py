"""Rows on their way to experts and back: uneven all-to-all over the expert group, outside autograd.

A rank of the expert group holds `num_local_experts` consecutive experts. Rows leave sorted by expert, so
they leave sorted by rank; they arrive grouped by sender and, within a sender, by local expert. No row is
ever dropped or padded: empty and hot experts only change the split sizes.

Shapes: G ranks in the group, E all experts, R rows leaving, S rows arriving, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.pipeline.action import Pass
from mhc_dist.pipeline.phase import ExchangeLoad
from mhc_dist.pipeline.streams import Flight, HostStreams, Streams, Token, Work


class ArrivalPlan(NamedTuple):
    """What this rank's experts will receive.

    `send_counts[g]` / `receive_counts[g]`: rows to / from group rank g. `order_S` sorts arriving rows by
    local expert and `position_S` undoes it; `expert_counts[e]` rows then belong to local expert e.
    """

    send_counts: list[int]
    receive_counts: list[int]
    order_S: Tensor
    position_S: Tensor
    expert_counts: list[int]


@dataclass
class _Pending:
    """An exchange on its way; without a flight where a rank is its own expert group: what it sends is there
    as soon as it is issued.
    """

    streams: Streams
    flight: Flight | None
    load: ExchangeLoad
    token: Token = field(init=False)

    def __post_init__(self) -> None:
        self.token = self.streams.position() if self.flight is None else None

    def land(self) -> None:
        if self.flight is not None:
            self.token = self.flight.land()


@dataclass
class PendingCounts(_Pending):
    """Row counts on their way. `wait` is the one point per layer where the host needs device data.

    It waits for these counts and for nothing that is queued already, on whatever stream.
    """

    sent_GE: Tensor = field(kw_only=True)
    received_GE: Tensor = field(kw_only=True)

    def wait(self) -> ArrivalPlan:
        self.land()
        plan = self.streams.answer(plan_arrival, self.sent_GE, self.received_GE, after=self.token)
        self.token = self.streams.position()
        return plan


@dataclass
class PendingRows(_Pending):
    """Rows on their way."""

    result: Tensor = field(kw_only=True)

    def wait(self) -> Tensor:
        self.land()
        return self.result


def plan_arrival(sent_GE: Tensor, received_GE: Tensor) -> ArrivalPlan:
    """From counts per (rank, local expert), both directions, to the split sizes and the order of arrival."""
    group_size, num_local = received_GE.shape
    device = received_GE.device
    # One transfer to the host for all three lists.
    counts = torch.cat((sent_GE.sum(1), received_GE.sum(1), received_GE.sum(0))).tolist()
    num_rows = sum(counts[2 * group_size :])
    expert_of_block = torch.arange(num_local, device=device).repeat(group_size)
    # Without the size, a device would have to be asked for it once more.
    expert_S = expert_of_block.repeat_interleave(received_GE.flatten(), output_size=num_rows)
    order_S = torch.argsort(expert_S, stable=True)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(order_S.numel(), device=device)
    return ArrivalPlan(
        counts[:group_size],
        counts[group_size : 2 * group_size],
        order_S,
        position_S,
        counts[2 * group_size :],
    )


class ExpertExchange:
    """The exchanges of one expert group.

    Forward and backward exchanges use separate process groups: each keeps its own order, so a forward and a
    backward that overlap never wait in one queue.
    """

    def __init__(
        self,
        num_experts: int,
        group_size: int = 1,
        forward_group: dist.ProcessGroup | None = None,
        backward_group: dist.ProcessGroup | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._streams = streams or HostStreams()
        assert num_experts % group_size == 0, (num_experts, group_size)
        assert group_size == 1 or (forward_group is not None and backward_group is not None)
        self.group_size = group_size
        self.num_local_experts = num_experts // group_size
        self._forward_group, self._backward_group = forward_group, backward_group

    def issue_counts(self, count_E: Tensor) -> PendingCounts:
        """Tell every rank how many rows each of its experts will get; count_E (E,) int64."""
        sent_GE = count_E.view(self.group_size, self.num_local_experts)
        if self.group_size == 1:
            return PendingCounts(
                self._streams, None, ExchangeLoad(0, 0), sent_GE=sent_GE, received_GE=sent_GE
            )
        received_GE = torch.empty_like(sent_GE)
        flight = self._transfer(Pass.FORWARD, received_GE, sent_GE, None, None)
        num_bytes = (self.group_size - 1) * sent_GE[0].numel() * sent_GE.element_size()
        load = ExchangeLoad(num_bytes, num_bytes)
        return PendingCounts(self._streams, flight, load, sent_GE=sent_GE, received_GE=received_GE)

    def issue_dispatch(self, rows_RC: Tensor, plan: ArrivalPlan) -> PendingRows:
        """Rows to their experts; arrives as (S, C)."""
        return self._issue(rows_RC, plan.send_counts, plan.receive_counts, Pass.FORWARD)

    def issue_combine(self, rows_SC: Tensor, plan: ArrivalPlan) -> PendingRows:
        """The experts' answers back to where the rows came from; arrives as (R, C) in the sender's order."""
        return self._issue(rows_SC, plan.receive_counts, plan.send_counts, Pass.FORWARD)

    def issue_dispatch_gradient(self, grad_SC: Tensor, plan: ArrivalPlan) -> PendingRows:
        return self._issue(grad_SC, plan.receive_counts, plan.send_counts, Pass.BACKWARD)

    def issue_combine_gradient(self, grad_RC: Tensor, plan: ArrivalPlan) -> PendingRows:
        return self._issue(grad_RC, plan.send_counts, plan.receive_counts, Pass.BACKWARD)

    def _issue(self, rows: Tensor, send: list[int], receive: list[int], direction: Pass) -> PendingRows:
        assert rows.shape[0] == sum(send), (rows.shape, send)
        if self.group_size == 1:
            return PendingRows(self._streams, None, ExchangeLoad(0, 0), result=rows)
        rows = rows.contiguous()  # gloo and NCCL both send flat memory
        result = rows.new_empty(sum(receive), rows.shape[1])
        flight = self._transfer(direction, result, rows, receive, send)
        local = dist.get_rank(self._group(direction))
        row_bytes = rows.shape[1] * rows.element_size()
        load = ExchangeLoad(
            (sum(send) - send[local]) * row_bytes, (sum(receive) - receive[local]) * row_bytes
        )
        return PendingRows(self._streams, flight, load, result=result)

    def _transfer(
        self,
        direction: Pass,
        result: Tensor,
        rows: Tensor,
        receive: list[int] | None,
        send: list[int] | None,
    ) -> Flight:
        def start() -> Work:
            group = self._group(direction)
            work: Work = dist.all_to_all_single(result, rows, receive, send, group=group, async_op=True)
            return work

        return self._streams.transfer(f"exchange {direction.value}", start, [result, rows])

    def _group(self, direction: Pass) -> dist.ProcessGroup | None:
        return self._forward_group if direction is Pass.FORWARD else self._backward_group


class _Reorder(torch.autograd.Function):
    """rows[order]; the backward is rows[inverse], a gather like the forward, so it is deterministic."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return grad.index_select(0, ctx.inverse), None, None


def sort_by_expert(arrived_SC: Tensor, plan: ArrivalPlan) -> Tensor:
    """Arrival order to expert order."""
    rows_SC: Tensor = _Reorder.apply(arrived_SC, plan.order_S, plan.position_S)
    return rows_SC


def sort_by_sender(rows_SC: Tensor, plan: ArrivalPlan) -> Tensor:
    """Expert order back to arrival order."""
    arrived_SC: Tensor = _Reorder.apply(rows_SC, plan.position_S, plan.order_S)
    return arrived_SC
