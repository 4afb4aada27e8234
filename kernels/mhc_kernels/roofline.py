"""Time a sublayer's connection must take at least: `python -m mhc_kernels.roofline --cluster h100`.

DERIVED, not measured: bytes from formula.py (equal to the counted ones) over the share of a device's memory
bandwidth that its cluster file assumes. It says how long the bytes take if everything else is hidden, not
more. `--cluster` is such a file or the name of one in configs/clusters.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from mhc_kernels import formula
from mhc_kernels.check import CHANNEL_MULTIPLE
from mhc_kernels.launch.sizes import parameter_splits
from mhc_kernels.spec import ConnectionSpec, Mixing
from mhc_kernels.tiles import ARCHITECTURES, tiles_for

BF16_BYTES = 2
CLUSTERS = Path("configs/clusters")


@dataclass(frozen=True)
class Device:
    """What a cluster file says about the memory of one device."""

    name: str
    bytes_per_second: float
    achieved_share: float
    """Part of the bandwidth that kernels like these reach: the file's `memory_efficiency`."""


@dataclass(frozen=True)
class Roofline:
    """Microseconds of one sublayer at the given size; `label` says what kind of figure this is."""

    label: str
    num_tokens: int
    channels: int
    achieved_share: float
    forward_us: float
    backward_us: float
    recompute_us: float

    @property
    def total_us(self) -> float:
        return self.forward_us + self.backward_us + self.recompute_us


def roofline(
    device: Device, num_tokens: int, channels: int, spec: ConnectionSpec, architecture: str = "sm_90"
) -> Roofline:
    if num_tokens < 1 or channels < 1 or channels % CHANNEL_MULTIPLE:
        raise ValueError(
            f"T={num_tokens}, C={channels}: at least one token and a multiple of {CHANNEL_MULTIPLE} channels "
            "are needed"
        )
    tiles = tiles_for(architecture, spec.num_streams, channels)

    def microseconds(moved: formula.Bytes) -> float:
        total = moved.per_token * num_tokens + moved.constants
        return 1e6 * total / (device.bytes_per_second * device.achieved_share)

    splits = parameter_splits(num_tokens, spec.num_streams, channels, tiles)
    return Roofline(
        "derived",
        num_tokens,
        channels,
        device.achieved_share,
        microseconds(formula.forward(channels, spec, tiles, BF16_BYTES)),
        microseconds(formula.backward(channels, spec, tiles, BF16_BYTES, splits)),
        microseconds(formula.recompute(channels, spec, BF16_BYTES)),
    )


def load_device(cluster: str) -> Device:
    """Read `device.memory_bytes_per_second` and `device.memory_efficiency` of a cluster file."""
    path = Path(cluster) if cluster.endswith((".yaml", ".yml")) else CLUSTERS / f"{cluster}.yaml"
    if not path.exists():
        raise ValueError(f"cluster file {path} does not exist: give a path, or a name of those in {CLUSTERS}")
    device = (yaml.safe_load(path.read_text()) or {}).get("device") or {}
    try:
        bandwidth, share = (
            float(device[key]["value"]) for key in ("memory_bytes_per_second", "memory_efficiency")
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} needs device.memory_bytes_per_second.value and device.memory_efficiency.value: {error!r}"
        ) from error
    if not (bandwidth > 0.0 and 0.0 < share <= 1.0):
        raise ValueError(f"{path}: bandwidth {bandwidth} must be positive and efficiency {share} in (0, 1]")
    return Device(str(device.get("name", path.stem)), bandwidth, share)


def report(arguments: argparse.Namespace) -> None:
    """Print what was asked for."""
    spec = ConnectionSpec(num_streams=arguments.streams, mixing=Mixing(arguments.mixing))
    device = load_device(arguments.cluster)
    rows = [roofline(device, arguments.tokens, c, spec, arguments.arch) for c in arguments.channels]
    if arguments.json:
        print(json.dumps([asdict(row) | {"total_us": row.total_us} for row in rows], indent=2))
        return
    print(f"DERIVED from bytes and bandwidth, not measured: {device}, T = {arguments.tokens}")
    print(f"{'C':>6}{'forward':>10}{'backward':>10}{'recompute':>11}{'total':>9}  microseconds per sublayer")
    for row in rows:
        print(
            f"{row.channels:6}{row.forward_us:10.1f}{row.backward_us:10.1f}{row.recompute_us:11.1f}"
            f"{row.total_us:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, nargs="+", default=[1280, 1920, 2560])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--mixing", choices=[str(mixing) for mixing in Mixing], default=str(Mixing.SINKHORN))
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90", help="whose tiles are used")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        report(arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
