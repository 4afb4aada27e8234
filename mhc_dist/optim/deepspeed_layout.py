"""Where a rank stands, in the words in which DeepSpeed asks."""

from __future__ import annotations

import torch.distributed as dist

from mhc_dist.topology import Topology


class DataParallelLayout:
    """What DeepSpeed asks of its `mpu`: pipeline ranks are model parallel ranks, there is no tensor split."""

    def __init__(self, topology: Topology, data_group: dist.ProcessGroup) -> None:
        self._topology, self._data_group = topology, data_group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._topology.data_group_ranks)

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data

    def get_model_parallel_rank(self) -> int:
        return self._topology.pipeline_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._topology.pipeline

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1
