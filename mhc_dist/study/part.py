"""One model of a study, trained in one process: the oracle model, AdamW, and the instruments of `observe`."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mhc_kernels
import torch
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import RunConfig, dump_config, load_config
from mhc_dist.data.batches import Batches, Sequences, ValidationWindows
from mhc_dist.data.token_files import TokenData, check_vocabulary
from mhc_dist.data.tokens import default_cache_folder, open_tokens
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import LanguageModel
from mhc_dist.optim.adamw import FlatAdamW
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.parameter_groups import parameter_groups
from mhc_dist.study.code_mark import ROOT, code_mark
from mhc_dist.study.instruments import gains_of, gains_over_depth, probe_by_layer
from mhc_dist.study.variants import variant_config

CODE = (
    *(ROOT / name for name in ("model", "data", "observe/stability.py")),
    *(ROOT / "optim" / f"{name}.py" for name in ("adamw", "learning_rate", "parameter_groups")),
    *(ROOT / "study" / f"{name}.py" for name in ("instruments", "part", "variants")),
    *(
        Path(mhc_kernels.__path__[0]) / f"{name}.py"
        for name in ("cpu_operations", "function_backend", "reference", "seam_function", "token_last")
    ),
)
"""What a part's figures depend on."""

NUM_MEASUREMENTS = 40
"""Of the mixes, spread over the steps of a part."""


@dataclass(frozen=True)
class PartPlan:
    """A part in terms that travel to another process, and the file that proves it was done."""

    config_path: Path
    overrides: tuple[str, ...]
    variant: str
    seed: int
    folder: Path
    commit: str = "unknown"
    """Of the code that runs the part: that of the study's start, whatever is committed meanwhile."""

    @property
    def config(self) -> RunConfig:
        return variant_config(load_config(self.config_path, self.overrides), self.variant, self.seed)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.variant}_seed{self.seed}.json"

    def fingerprint(self) -> str:
        """Changes with everything that changes the result: the configuration, and the code that runs it."""
        text = f"{dump_config(self.config)}\n{code_mark(CODE)}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def done(self) -> dict[str, Any] | None:
        """The part's result, if an earlier run of the same configuration by the same code left it."""
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return content if content.get("fingerprint") == self.fingerprint() else None


def run_part(plan: PartPlan) -> dict[str, Any]:
    """Train the part's model and write its result; a result that is there already is returned."""
    if (before := plan.done()) is not None:
        return before
    torch.set_num_threads(1)
    config = plan.config
    tokens = open_tokens(config.data, default_cache_folder())
    check_vocabulary(tokens, config.model.vocab_size)
    result = {
        "fingerprint": plan.fingerprint(),
        "variant": plan.variant,
        "seed": plan.seed,
        "commit": plan.commit,
        **train_and_measure(config, tokens),
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    unfinished = plan.path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.replace(plan.path)
    return result


def train_and_measure(config: RunConfig, tokens: TokenData) -> dict[str, Any]:
    """Records of all steps, gains over depth at the end, losses, seconds by the clock and of the processor.

    The latter do not count what a busy machine, or a pause, takes: they tell what the part costs.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    model = LanguageModel(config, make_backend(config.kernels.backend))
    initialize(model, config)
    probe = probe_by_layer(model, max(1, config.train.steps // NUM_MEASUREMENTS))
    optimizer = _optimizer(config, model)
    data = config.data
    batches = Batches(tokens.train, data.sequence_length, data.seed, config.sequences_per_step)
    records: list[dict[str, Any]] = []
    depth: dict[str, list[float]] = {}
    for step in range(config.train.steps):
        probe.arm(step + 1)
        loss = model(*_tensors(batches.sequences(step, 0, config.sequences_per_step)))
        figures = probe.take()
        loss.backward()
        grad_norm = _clip(model, config.optim.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, config.train.steps, step)
        optimizer.step()
        model.zero_grad()
        record = {"step": step + 1, "loss": loss.item(), "grad_norm": grad_norm}
        if figures is not None:
            record |= gains_of(figures)
            depth = gains_over_depth(figures)
        records.append(record)
    return {
        "records": records,
        "depth": depth,
        "validation_loss": _validation_loss(model, config, tokens),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }


def _optimizer(config: RunConfig, model: LanguageModel) -> FlatAdamW:
    groups = [
        {
            "params": list(group.parameters),
            "lr": 0.0,
            "weight_decay": config.optim.weight_decay if group.decays else 0.0,
        }
        for group in parameter_groups(model.named_parameters())
    ]
    return FlatAdamW(groups, config.optim.betas, config.optim.eps)


def _clip(model: LanguageModel, largest: float) -> float:
    """Norm of all gradients before they are scaled down to `largest` (0: they are left alone).

    A parameter that no token met has a zero gradient, as in training.
    """
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bound = largest if largest > 0 else float("inf")
    return float(torch.nn.utils.clip_grad_norm_(list(model.parameters()), bound))


def _tensors(sequences: Sequences) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(sequences.inputs), torch.from_numpy(sequences.targets)


@torch.no_grad()
def _validation_loss(model: LanguageModel, config: RunConfig, tokens: TokenData) -> float:
    """Mean over the run's validation windows, nats per token."""
    num_rows = config.sequences_per_step
    num_batches = config.train.validation_batches
    windows = ValidationWindows(tokens.validation, config.data.sequence_length, num_rows * num_batches)
    losses: list[float] = [
        model(*_tensors(windows.sequences(batch * num_rows, num_rows))).item() for batch in range(num_batches)
    ]
    return sum(losses) / num_batches
