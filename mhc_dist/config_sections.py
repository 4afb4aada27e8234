"""The sections of a run's YAML file: keys, types, defaults, and what each key means.

Unknown keys are refused everywhere, so that a misspelled option cannot be silently ignored. Whether the
sections agree with each other is checked in `config_checks`; `config.RunConfig` is the checked whole.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_for_switches_alone(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `on` and `yes` as true: never take those for the number 1, nor 1 for true."""
        assert info.field_name is not None
        is_switch = cls.model_fields[info.field_name].annotation is bool
        if isinstance(value, bool) and not is_switch:
            raise ValueError("a number or a word, not true or false")
        if is_switch and not isinstance(value, bool):
            raise ValueError("true or false")
        return value


Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelConfig(Section):
    """Shape of the language model (mHC paper, table 5; DeepSeekMoE with multi-head latent attention)."""

    num_layers: PositiveInt
    num_dense_layers: NonNegativeInt = 1
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    num_heads: PositiveInt
    head_dim: PositiveInt = 128
    value_dim: PositiveInt = 128
    rope_dim: PositiveInt = 64
    kv_rank: PositiveInt = 512
    rope_theta: PositiveFloat = 1.0e4
    num_experts: PositiveInt
    num_active_experts: PositiveInt
    num_shared_experts: NonNegativeInt = 0
    expert_dim: PositiveInt
    dense_dim: PositiveInt | None = None
    """FFN width of the leading dense layers; by default 8 x expert_dim, as in the paper's models."""
    norm_eps: PositiveFloat = 1.0e-20
    init_std: PositiveFloat = 0.02
    gate_scale: PositiveFloat = 1.0
    """Factor on the normalised gate weights of the routed experts."""
    balance_rate: NonNegativeFloat = 1.0e-3
    """Step of the loss-free balancing bias; 0 switches balancing off."""


class ResidualKind(StrEnum):
    RESIDUAL = "residual"
    HC = "hc"
    MHC = "mhc"
    IDENTITY = "identity"
    MHC_LITE = "mhc_lite"
    """H_res is a softmax mixture of all n! permutations: doubly stochastic without iterations, n <= 4."""
    KROM = "krom"
    """H_res is a Kronecker product of 2x2 doubly stochastic factors: log2(n) coefficients, for n = 8."""


class ResidualConfig(Section):
    """How sublayers are connected (see README, symbol table)."""

    kind: ResidualKind = ResidualKind.MHC
    num_streams: PositiveInt = 4
    sinkhorn_iterations: PositiveInt = 20
    sinkhorn_eps: NonNegativeFloat = 0.0
    """0 is the paper's Sinkhorn; 1e-6 is DeepSeek-V4's (row softmax start, eps in every division)."""
    pre_eps: NonNegativeFloat = 0.0
    """Added to H_pre: 0 in the paper, 1e-6 in DeepSeek-V4."""
    init: Literal["paper_zero_bias", "identity_leaning"] = "identity_leaning"
    alpha_init: float = 0.01
    reduce: Literal["learned", "mean", "sum"] = "learned"
    shifted_pre: bool = False
    """true: streams are collapsed with the H_pre that the sublayer before computed, as in DeepSeek-V4.1."""


class ParallelConfig(Section):
    """Processes = pipeline x data. `expert` consecutive data ranks share one set of experts."""

    pipeline: PositiveInt = 1
    data: PositiveInt = 1
    expert: PositiveInt = 1


class ScheduleConfig(Section):
    name: str = "dualpipev"
    num_microbatches: PositiveInt = 4
    cluster: str | None = None
    """A cluster file, or its name in configs/clusters: phases are placed by its predicted costs, so that
    computation runs while tokens fly. null runs them one after the other in the schedule's order."""
    boundaries: Literal["auto"] | tuple[PositiveInt, ...] = "auto"
    """First layers of all chunks but the first; `mhc-dist plan` prints the best found. auto: every pipeline
    rank gets its share of the operations."""


class RecomputeConfig(Section):
    """What is dropped after the forward and regenerated before the backward."""

    mode: Literal["none", "mhc", "full"] = "none"
    """mhc: streams and sublayer inputs (paper, 4.3.2); full: everything but the inputs of phases."""
    block: Literal["auto"] | PositiveInt = "auto"


class KernelsConfig(Section):
    """Which implementation of the hyper-connection seams runs; the names of `mhc_kernels.seam`."""

    backend: Literal["reference", "cpu", "compiled", "triton"] = "cpu"


class DataConfig(Section):
    corpus: str = "python-stdlib"
    """`python-stdlib`, a folder of text files, or a prepared token file (`mhc-dist data prepare`)."""
    sequence_length: PositiveInt = 256
    sequences_per_microbatch: PositiveInt = 1
    validation_fraction: Fraction = 0.05
    seed: NonNegativeInt = 0


class OptimConfig(Section):
    peak_learning_rate: PositiveFloat = 1.0e-3
    warmup_steps: NonNegativeInt = 10
    decay_at: tuple[tuple[Fraction, PositiveFloat], ...] = ((0.8, 0.316), (0.9, 0.1))
    """(fraction of training, factor on the peak rate) pairs, in order."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.1
    gradient_clipping: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""


class TrainConfig(Section):
    name: str = "run"
    """Names the run's folder, output/name."""
    output: Path = Path("runs")
    steps: PositiveInt = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: NonNegativeInt = 0
    validate_every: NonNegativeInt = 50
    """Steps between validations; 0 validates at the end only."""
    validation_batches: PositiveInt = 4
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_seconds: PositiveFloat = 60.0
    """Longest silence of a peer before the run is ended."""
    join_seconds: PositiveFloat = 300.0
    """How long ranks wait for each other at the start: nodes may have to pull an image first."""

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("letters, digits, dots, dashes and underscores: it names a folder")
        return name


class CheckpointConfig(Section):
    """When the state of a run is saved, under output/name/checkpoints (see mhc_dist/checkpoint/README.md)."""

    mode: Literal["async", "sync", "none"] = "async"
    """async: training goes on while a copy in host memory is written; sync: it waits; none: no saves."""
    every_steps: NonNegativeInt = 100
    """Steps between saves; 0 saves at the end and on a request to stop only."""
    keep_last: NonNegativeInt = 2
    """How many of the newest checkpoints stay; 0 keeps all."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are a multiple of this stay for good; 0 keeps none for good."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest time a save or a load may take before the run is ended."""
    stop_seconds: PositiveFloat = 60.0
    """Longest time between a request to stop and the end: the step under way and the last checkpoint."""


class GuardConfig(Section):
    """What happens when the numbers go wrong."""

    max_nonfinite_steps: PositiveInt = 5
    """This many skipped steps in a row send the run back to its last checkpoint."""
    max_rollbacks: NonNegativeInt = 2
    """How often that may happen before the run is given up."""
    spike_window: NonNegativeInt = 50
    """Steps whose losses say what is usual; 0 switches the detector off."""
    spike_threshold: PositiveFloat = 8.0
    """A loss this many robust standard deviations above the window's median is a spike."""


class ObserveConfig(Section):
    metrics_port: Port = 9400
    """Rank r of a node exports on metrics_port + local rank; 0 switches the exporter off."""
    trace_steps: list[PositiveInt] = []
    """Steps, counted from 1, whose every action is written to trace/ in the run's folder."""
    stability_every: NonNegativeInt = 50
    """Steps between measurements of the residual mixes (Amax gain and others), beside the first; 0: none."""


class RunSections(Section):
    """All sections of a run, and what follows from them by arithmetic."""

    model: ModelConfig
    residual: ResidualConfig = ResidualConfig()
    parallel: ParallelConfig = ParallelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    kernels: KernelsConfig = KernelsConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    observe: ObserveConfig = ObserveConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed through to DeepSpeed after checks; options that break correctness here are refused."""

    @property
    def folder(self) -> Path:
        """Where everything this run writes goes."""
        return self.train.output / self.train.name

    @property
    def num_processes(self) -> int:
        return self.parallel.pipeline * self.parallel.data

    @property
    def sequences_per_step(self) -> int:
        """Sequences in the global batch of one optimizer step."""
        return self.parallel.data * self.schedule.num_microbatches * self.data.sequences_per_microbatch

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.data.sequence_length
