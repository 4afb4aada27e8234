"""A cluster as numbers, each with its source: `configs/clusters/*.yaml`. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Constant(_Section):
    """A number and where it comes from: a data sheet, a measurement, or an assumption that says so."""

    value: PositiveFloat
    source: str


class Link(_Section):
    """One level of the network, as one accelerator sees it, one way."""

    bytes_per_second: Constant
    latency_seconds: Constant


class MatmulRates(_Section):
    """Dense matrix operations per second at peak, by number format."""

    bf16: Constant
    fp32: Constant


class Device(_Section):
    """One accelerator. Efficiencies are the share of the peak that kernels of this kind sustain."""

    name: str
    matmul_flops: MatmulRates
    matmul_efficiency: Constant
    attention_efficiency: Constant
    memory_bytes: Constant
    usable_memory: Constant
    """Share of memory left after the runtime, communication buffers and fragmentation."""
    memory_bytes_per_second: Constant
    memory_efficiency: Constant
    compute_share: Constant
    """Share of the multiprocessors left for compute while communication kernels run."""


class Cluster(_Section):
    """Equal nodes of equal accelerators. `node_link` joins those of a node, `network_link` the nodes."""

    name: str
    description: str
    device: Device
    devices_per_node: PositiveInt
    num_nodes: PositiveInt
    node_link: Link
    network_link: Link

    @property
    def num_devices(self) -> int:
        return self.devices_per_node * self.num_nodes

    def matmul_rate(self, precision: Literal["fp32", "bf16"]) -> float:
        """Peak operations per second in `precision`."""
        rates = self.device.matmul_flops
        return rates.bf16.value if precision == "bf16" else rates.fp32.value

    def constants(self) -> list[tuple[str, Constant]]:
        """Every number of the file with its dotted name, for printing."""
        return list(_constants("", self))


def _constants(prefix: str, section: BaseModel) -> list[tuple[str, Constant]]:
    found: list[tuple[str, Constant]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Constant):
            found.append((prefix + name, value))
        elif isinstance(value, BaseModel):
            found += _constants(f"{prefix}{name}.", value)
    return found


CLUSTER_FOLDERS = (
    Path("configs/clusters"),
    Path(__file__).resolve().parents[2] / "configs/clusters",
    Path(sys.prefix) / "configs/clusters",
)
"""Where names are looked up: under the current folder, beside the package, in the environment (images)."""


def load_cluster(name_or_path: str, folders: Sequence[Path] = CLUSTER_FOLDERS) -> Cluster:
    """A cluster file by path, or by name from `folders`. ValueError says what is wrong and where."""
    path = Path(name_or_path)
    if not path.suffix:
        candidates = [folder / f"{name_or_path}.yaml" for folder in folders]
        path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    if not path.is_file():
        known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
        raise ValueError(
            f"no cluster file {path}. Known clusters: {', '.join(known) or 'none'}; or give a path."
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return Cluster.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in error.errors()
        )
        raise ValueError(f"{path} does not describe a cluster: {problems}") from None
