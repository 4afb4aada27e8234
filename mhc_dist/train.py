"""START HERE. One process of a run: main -> train -> train_step.

The launcher starts pipeline x data of these. Each finds out which rank it is, builds its share of the model,
and then executes the same program as its peers, step after step.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from mhc_launcher.bootstrap import RankEnvironment, read_rank_environment

from mhc_dist.config import RunConfig, dump_config, load_config
from mhc_dist.data.batches import Batches, Sequences, ValidationWindows
from mhc_dist.data.bigram import Bigram
from mhc_dist.data.token_files import check_vocabulary
from mhc_dist.data.tokens import default_cache_folder, open_tokens
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.peers import PeerWatch, WatchLimits
from mhc_dist.guard.signals import SignalInbox
from mhc_dist.model.flops import model_flops_per_token
from mhc_dist.observe.metrics import Work
from mhc_dist.observe.reporter import RunReporter, StepFigures
from mhc_dist.parallel.agreement import check_agreement
from mhc_dist.parallel.expert_balance import balance_routers
from mhc_dist.parallel.process_groups import ProcessGroups, destroy, init_distributed, run_store
from mhc_dist.plan.device_peak import device_peak_flops
from mhc_dist.plan.run_programs import RunPrograms, plan_run
from mhc_dist.topology import Topology
from mhc_dist.worker import Worker

OPENING_SECONDS = 3600.0
"""A large folder of text is encoded once, by one rank of a host, while the others wait for its lock."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Join the run, train, leave. Returns the exit code of this process."""
    parser = argparse.ArgumentParser(prog="python -m mhc_dist.train")
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration of the run")
    parser.add_argument("--local_rank", type=int, help="added by the deepspeed launcher; RANK decides")
    config = load_config(parser.parse_args(arguments).config)
    inbox = SignalInbox()
    place = read_rank_environment()
    try:
        device = init_distributed(place, config.train.backend, config.train.timeout_seconds)
        limits = WatchLimits(action_seconds=config.train.timeout_seconds)
        # torchrun's agent may host the store in a process of its own.
        store_rank = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        with PeerWatch(
            run_store(), place.rank, place.world_size, inbox=inbox, store_rank=store_rank, limits=limits
        ) as watch:
            return train(config, place, device, watch)
    except ValueError as error:
        return _failed(config, place, ExitCode.USAGE, str(error))
    except Exception as error:
        # Whatever it was, the other ranks know already (PeerWatch); here the user learns where.
        traceback.print_exc()
        return _failed(config, place, ExitCode.ERROR, f"{type(error).__name__}: {error}")
    finally:
        inbox.close()
        destroy()


def train(config: RunConfig, place: RankEnvironment, device: torch.device, watch: PeerWatch) -> ExitCode:
    """Build this rank's part of the run and make all steps."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, place.rank)
    topology.check_world_size(place.world_size)
    programs = plan_run(config)
    watch.report_action("opening the corpus", may_take_seconds=OPENING_SECONDS)
    tokens = open_tokens(config.data, default_cache_folder())
    check_vocabulary(tokens, config.model.vocab_size)
    bigram = Bigram(tokens.train, config.model.vocab_size) if place.rank == 0 else None
    check_agreement(run_facts(config, programs, tokens.fingerprint))

    groups = ProcessGroups.build(topology, config.train.timeout_seconds, programs.training.links)
    worker = Worker.build(config, programs, topology, groups, device, watch.report_action)
    batches = Batches(tokens.train, config.data.sequence_length, config.data.seed, config.sequences_per_step)
    num_validated = config.sequences_per_step * config.train.validation_batches
    windows = ValidationWindows(tokens.validation, config.data.sequence_length, num_validated)

    work = Work(model_flops_per_token(config), device_peak_flops(config))
    with RunReporter(config, topology, place.local_rank, place.local_world_size, work) as reporter:
        reporter.announce(describe(config, programs, tokens.description, device))
        for step in range(config.train.steps):
            figures = train_step(worker, batches, step, stop=watch.stop_reason is not None)
            reporter.trace(figures)
            is_last = step + 1 == config.train.steps
            every = config.train.validate_every
            due = is_last or (every > 0 and (step + 1) % every == 0)
            reporter.step(figures, validate(worker, windows) if due and not figures.stop else None)
            if figures.stop:
                reporter.announce(f"stopped after step {step + 1} of {config.train.steps} on request")
                return ExitCode.STOPPED
        if bigram is not None:
            reporter.finish(bigram.loss(*windows.sequences(0, windows.num_sequences)))
    worker.engine.close()
    return ExitCode.OK


def train_step(worker: Worker, batches: Batches, step: int, *, stop: bool) -> StepFigures:
    """One optimizer step over the global batch of `step` (counted from 0).

    `stop`: this rank was asked to stop; the figures say whether any rank was.
    """
    start = time.perf_counter()
    microbatches = worker.microbatches(lambda first, count: batches.sequences(step, first, count))
    data_seconds = time.perf_counter() - start
    output = worker.executor.run(worker.programs.training, microbatches, worker)
    outcome = worker.take_outcome()
    verdict = worker.agree(output.losses, stop=stop)
    rate = worker.config.model.balance_rate if outcome.applied else 0.0
    load_ratios = balance_routers((router for _, router in worker.stage.routers()), rate, worker.groups.data)
    return StepFigures(
        step=step + 1,
        loss=verdict.loss,
        grad_norm=outcome.grad_norm,
        learning_rate=outcome.learning_rate,
        applied=outcome.applied,
        stop=verdict.stop,
        num_tokens=worker.config.tokens_per_step,
        seconds=time.perf_counter() - start,
        data_seconds=data_seconds,
        load_max_to_mean_ratio=max(load_ratios, default=None),
        trace=output.trace,
    )


def validate(worker: Worker, windows: ValidationWindows) -> float:
    """Mean loss over the validation windows, nats per token; the same on every rank."""
    losses = []
    for batch in range(worker.config.train.validation_batches):
        skipped = batch * worker.config.sequences_per_step

        def load(first: int, count: int, skipped: int = skipped) -> Sequences:
            return windows.sequences(skipped + first, count)

        output = worker.executor.run(worker.programs.evaluation, worker.microbatches(load))
        losses.append(worker.agree(output.losses).loss)
    return sum(losses) / len(losses)


def run_facts(config: RunConfig, programs: RunPrograms, corpus: str) -> dict[str, str]:
    """What has to be equal on all ranks before the first step."""
    return {
        "the configuration": hashlib.blake2b(dump_config(config).encode(), digest_size=8).hexdigest(),
        "the program of a step": programs.training.digest(),
        "the program of an evaluation": programs.evaluation.digest(),
        "the corpus": corpus,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(config: RunConfig, programs: RunPrograms, corpus: str, device: torch.device) -> str:
    """The choices of a run, said aloud once: nothing falls back silently."""
    sizes, layers = config.parallel, [place.last_layer - place.first_layer for place in programs.places]
    return (
        f"{config.num_processes} processes: pipeline {sizes.pipeline} x data {sizes.data}, experts over"
        f" {sizes.expert}; {config.schedule.name} with {config.schedule.num_microbatches} microbatches,"
        f" {'in order' if config.schedule.cluster is None else f'placed for {config.schedule.cluster}'};"
        f" {len(layers)} chunks of {layers} layers on ranks {list(programs.training.chunk_rank)}\n"
        f"{config.residual.kind} with {config.residual.num_streams} streams, {config.kernels.backend}"
        f" kernels, {config.train.precision} on {device.type}, recompute {config.recompute.mode}\n"
        f"{corpus}"
    )


def _failed(config: RunConfig, place: RankEnvironment, code: ExitCode, message: str) -> int:
    """Leave word for the launcher, unless another rank failed first, and return the exit code."""
    with contextlib.suppress(OSError), (config.folder / "failure.json").open("x") as file:
        json.dump({"rank": place.rank, "exit_code": int(code), "message": message}, file)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
