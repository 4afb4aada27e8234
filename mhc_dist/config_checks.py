"""What single values cannot tell: whether the sections of a run agree with each other.

Each check answers with a sentence that carries the numbers and the remedy, or says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from mhc_dist.config_sections import RunSections
from mhc_dist.optim.deepspeed_options import check_config
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.topology import Topology

SEAM_CHANNELS = 16
"""Channels that the seams of hyper-connections handle at a time, whatever the backend."""


def disagreements(config: RunSections) -> list[str]:
    """One sentence per problem; an empty list means that the run is possible."""
    checks = (
        _model,
        _residual,
        _experts,
        _schedule,
        _recompute,
        _optimizer,
        _ports,
        _traces,
        _checkpoints,
        _deepspeed,
    )
    return [problem for check in checks for problem in check(config)]


def _model(config: RunSections) -> Iterator[str]:
    model = config.model
    if model.rope_dim % 2:
        yield (
            f"model.rope_dim={model.rope_dim} is odd: RoPE rotates pairs of values."
            f" Set model.rope_dim to {model.rope_dim + 1}."
        )
    if model.num_active_experts > model.num_experts:
        yield (
            f"model.num_active_experts={model.num_active_experts} is more than"
            f" model.num_experts={model.num_experts}. Lower the one or raise the other."
        )
    if model.num_dense_layers > model.num_layers:
        yield (
            f"model.num_dense_layers={model.num_dense_layers} is more than"
            f" model.num_layers={model.num_layers}. Set model.num_dense_layers to {model.num_layers} or less."
        )


def _residual(config: RunSections) -> Iterator[str]:
    residual = config.residual
    if residual.kind.value == "residual" and residual.num_streams != 1:
        yield (
            f"residual.num_streams={residual.num_streams} with residual.kind=residual: the plain residual"
            " has one stream. Set residual.num_streams=1, or choose another residual.kind."
        )
    possible = {"mhc": (2, 4, 8), "identity": (2, 4, 8), "mhc_lite": (2, 4), "krom": (2, 4, 8)}
    streams = possible.get(residual.kind.value)
    if streams is not None and residual.num_streams not in streams:
        yield (
            f"residual.num_streams={residual.num_streams} with residual.kind={residual.kind}: it exists for"
            f" {', '.join(map(str, streams))} streams. Set residual.num_streams to one of these."
        )
    width = config.model.hidden_size
    if streams is not None and width % SEAM_CHANNELS:
        yield (
            f"model.hidden_size={width} with residual.kind={residual.kind}: hyper-connections handle"
            f" {SEAM_CHANNELS} channels at a time. Set model.hidden_size to"
            f" {width + SEAM_CHANNELS - width % SEAM_CHANNELS}, or residual.kind to residual or hc."
        )
    if residual.shifted_pre and streams is None:
        yield (
            f"residual.shifted_pre=true with residual.kind={residual.kind}: only"
            f" {', '.join(possible)} compute an H_pre that can be handed on. Choose one of these, or set"
            " residual.shifted_pre=false."
        )
    if residual.kind.value == "krom" and config.kernels.backend == "triton":
        yield (
            "residual.kind=krom has no Triton kernels. Set kernels.backend to cpu or compiled, or choose"
            " another residual.kind."
        )


def _experts(config: RunSections) -> Iterator[str]:
    parallel, num_experts = config.parallel, config.model.num_experts
    try:
        Topology(parallel.pipeline, parallel.data, parallel.expert).check()
    except ValueError as error:
        yield str(error)
    if num_experts % parallel.expert:
        yield (
            f"parallel.expert={parallel.expert} does not divide model.num_experts={num_experts}: every"
            f" rank holds the same number of experts. Set parallel.expert to a divisor of {num_experts}, or"
            f" model.num_experts to {num_experts + parallel.expert - num_experts % parallel.expert}."
        )


def _recompute(config: RunSections) -> Iterator[str]:
    kind = config.residual.kind
    if config.recompute.mode == "mhc" and kind in ("residual", "hc"):
        yield (
            f"recompute.mode=mhc regenerates the streams of hyper-connections, which residual.kind={kind}"
            " does not have in a form it knows. Set recompute.mode to full or none, or residual.kind to mhc,"
            " identity, mhc_lite or krom."
        )


def _schedule(config: RunSections) -> Iterator[str]:
    pipeline = config.parallel.pipeline
    try:
        schedule = make_schedule(config.schedule.name, pipeline, config.schedule.num_microbatches)
    except ValueError as error:
        yield f"schedule.name={config.schedule.name} with parallel.pipeline={pipeline}: {error}"
        return
    if schedule.num_copies > 1:
        yield (
            f"schedule.name={config.schedule.name} keeps {schedule.num_copies} copies of the model: it can be"
            " planned and compared, but not trained. Set schedule.name to dualpipev, which pairs forwards and"
            " backwards in the same way with one copy."
        )
        return
    num_chunks = len(schedule.chunk_rank)
    if config.model.num_layers < num_chunks:
        yield (
            f"model.num_layers={config.model.num_layers} is less than the {num_chunks} chunks that"
            f" schedule.name={config.schedule.name} cuts the model into on parallel.pipeline={pipeline}"
            f" ranks: each chunk needs a layer. Raise model.num_layers to {num_chunks}, or lower"
            " parallel.pipeline."
        )
        return
    cuts = config.schedule.boundaries
    if cuts == "auto":
        return
    if len(cuts) != num_chunks - 1:
        yield (
            f"schedule.boundaries has {len(cuts)} entries, but schedule.name={config.schedule.name} on"
            f" parallel.pipeline={pipeline} ranks has {num_chunks - 1} boundaries between its {num_chunks}"
            " chunks. List the first layer of every chunk but the first, or set schedule.boundaries=auto."
        )
    elif list(cuts) != sorted(set(cuts)) or cuts[-1:] > (config.model.num_layers - 1,):
        yield (
            f"schedule.boundaries={list(cuts)} must increase and stay below"
            f" model.num_layers={config.model.num_layers}: every chunk needs a layer. Or set"
            " schedule.boundaries=auto."
        )


def _optimizer(config: RunSections) -> Iterator[str]:
    fractions = [fraction for fraction, _ in config.optim.decay_at]
    if fractions != sorted(set(fractions)):
        yield (
            f"optim.decay_at has its steps at {fractions} of training, which is not increasing."
            " Write them in order, each once."
        )


def _ports(config: RunSections) -> Iterator[str]:
    port, processes = config.observe.metrics_port, config.parallel.pipeline * config.parallel.data
    if port and port + processes - 1 > 65535:
        yield (
            f"observe.metrics_port={port} plus {processes} processes passes 65535, the last port."
            f" Set observe.metrics_port to {65536 - processes} or less, or to 0 for no exporter."
        )


def _traces(config: RunSections) -> Iterator[str]:
    steps, last = config.observe.trace_steps, config.train.steps
    if late := [step for step in steps if step > last]:
        yield (
            f"observe.trace_steps={steps} has {late}, but the run ends with step {last}: nothing would be"
            f" written. Set observe.trace_steps to steps from 1 to {last}, or raise train.steps."
        )


def _checkpoints(config: RunSections) -> Iterator[str]:
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    if keep and (every == 0 or keep % every):
        yield (
            f"checkpoint.keep_every={keep} is no multiple of checkpoint.every_steps={every}: no checkpoint is"
            f" made at most of those steps. Set checkpoint.keep_every to a multiple of"
            f" checkpoint.every_steps, or to 0."
        )


def _deepspeed(config: RunSections) -> Iterator[str]:
    try:
        check_config(config.deepspeed)
    except ValueError as error:
        yield str(error)
