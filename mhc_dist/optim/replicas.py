"""Do ranks that must hold the same weights hold the same weights?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mhc_dist.optim.parameter_groups import ParameterGroup
from mhc_dist.topology import Topology

Summary = list[tuple[str, list[tuple[str, tuple[int, ...]]], str, str]]


def check_replicas(groups: list[ParameterGroup], topology: Topology, data_group: dist.ProcessGroup) -> None:
    """Compare parameter shapes and initial weights over the data ranks of a stage; collective over them.

    Dense parameters must agree on all of them, experts on those with the same expert rank. Raises
    RuntimeError that names two ranks and the group. Broadcasting rank 0's weights instead would hide that
    a model depends on more than its seed.
    """
    mine = [_summary(groups, expert=False), _summary(groups, expert=True)]
    summaries: list[Any] = [None] * topology.data
    dist.all_gather_object(summaries, mine, group=data_group)
    for kind, first_data_rank in ((0, 0), (1, topology.expert_rank)):
        reference: Summary = summaries[first_data_rank][kind]
        if mine[kind] == reference:
            continue
        here, there = topology.rank, topology.rank_of(topology.pipeline_rank, first_data_rank)
        raise RuntimeError(
            f"rank {here} and rank {there} start with different {_difference(mine[kind], reference)}:"
            " replicas of a pipeline stage must be built alike from train.seed. Build parameters from their"
            " place in the model, not from the rank."
        )


def _summary(groups: list[ParameterGroup], expert: bool) -> Summary:
    """Per group: description, shapes, and two sums that equal weights share bit for bit.

    Names are left out for experts: they may carry the expert's number.
    """
    summary: Summary = []
    for group in groups:
        if group.is_expert == expert:
            names = [""] * len(group.names) if expert else group.names
            shapes = [
                (name, tuple(parameter.shape))
                for name, parameter in zip(names, group.parameters, strict=True)
            ]
            flat = [parameter.detach().double() for parameter in group.parameters]
            total = float(torch.stack([values.sum() for values in flat]).sum())
            squares = float(torch.stack([values.square().sum() for values in flat]).sum())
            summary.append((str(group), shapes, total.hex(), squares.hex()))
    return summary


def _difference(mine: Summary, reference: Summary) -> str:
    if [entry[:2] for entry in mine] != [entry[:2] for entry in reference]:
        return f"parameters ({[entry[0] for entry in mine]} against {[entry[0] for entry in reference]})"
    kinds = [entry[0] for entry, other in zip(mine, reference, strict=True) if entry != other]
    return f"weights in {', '.join(kinds)}"
