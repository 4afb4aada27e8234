"""What the comparison's times say. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mhc_dist.bench.peers.ratio import paired_ratio

OURS, OURS_MHC = "ours_recompute_none", "ours_recompute_mhc"
DEEPSPEED, TORCH = "deepspeed_dualpipev", "torch_dualpipev"
DEEPSPEED_SHARED, TORCH_SHARED = f"{DEEPSPEED}_shared_hidden", f"{TORCH}_shared_hidden"
PEERS = (DEEPSPEED, TORCH, DEEPSPEED_SHARED, TORCH_SHARED)


@dataclass(frozen=True)
class Measured:
    """One engine: seconds of its steps in order, and the largest heap of a rank."""

    seconds: Sequence[float]
    peak_bytes: int


def figures_of(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Headline keys compare with what this project runs by default, streams recomputed."""
    speedups = {
        ours: {
            peer: asdict(paired_ratio(measured[peer].seconds, measured[ours].seconds))
            for peer in PEERS
            if peer in measured
        }
        for ours in (OURS, OURS_MHC)
    }
    return {
        "speedup_deepspeed_dualpipev": speedups[OURS_MHC][DEEPSPEED]["median"],
        "speedup_torch_dualpipev": speedups[OURS_MHC][TORCH]["median"],
        "speedups": speedups,
        "step_seconds": {name: median(one.seconds) for name, one in measured.items()},
        "peak_bytes": {name: one.peak_bytes for name, one in measured.items()},
        "rounds": len(measured[OURS].seconds),
    }
