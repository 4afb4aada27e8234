"""START HERE. One process of a run: main -> train -> train_step.

The launcher starts pipeline x data of these. Each finds out which rank it is, builds its share of the model,
and then executes the same program as its peers, step after step.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mhc_launcher.bootstrap import read_rank_environment
from mhc_launcher.code_hash import code_hash
from mhc_launcher.interfaces import network_settings

from mhc_dist.checkpoint.keeper import CheckpointKeeper
from mhc_dist.checkpoint.manifest import CheckpointError, Progress
from mhc_dist.checkpoint.state import RankState
from mhc_dist.config import RunConfig, dump_config, load_config
from mhc_dist.data.batches import Batches, Sequences, ValidationWindows
from mhc_dist.data.bigram import Bigram
from mhc_dist.data.token_files import check_vocabulary
from mhc_dist.data.tokens import default_cache_folder, open_tokens
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.last_words import LastWords
from mhc_dist.guard.nonfinite import DivergedError, NonfiniteGuard
from mhc_dist.guard.peers import PeerWatch
from mhc_dist.guard.signals import SignalInbox
from mhc_dist.guard.spikes import SpikeDetector
from mhc_dist.guard.stop import StopKind
from mhc_dist.guard.watch_limits import WatchLimits
from mhc_dist.model.flops import model_flops_per_token
from mhc_dist.observe.metrics import Work
from mhc_dist.observe.reporter import RunReporter, StepFigures, monitored
from mhc_dist.parallel.agreement import check_agreement
from mhc_dist.parallel.expert_balance import balance_routers
from mhc_dist.parallel.join import Place, join_run, versions
from mhc_dist.parallel.process_groups import ProcessGroups, abandon, destroy, run_store
from mhc_dist.parallel.roll_call import RollCallError
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
    parser.add_argument("--resume", metavar="auto|STEP|PATH", help="continue from a checkpoint")
    parser.add_argument("--restarts", type=int, default=0, help="how often the run was started again")
    parsed = parser.parse_args(arguments)
    inbox = SignalInbox()
    try:
        config = load_config(parsed.config)
        place = read_rank_environment()
        several_hosts = place.local_world_size < place.world_size
        os.environ.update(network_settings(os.environ, place.master_addr, several_hosts))
    except ValueError as error:
        print(f"host {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return int(ExitCode.USAGE)
    last_words = LastWords(config.folder, place.rank)
    try:
        joined = join_run(
            place,
            config.train.backend,
            start_facts(config),
            node=place.node,
            join_seconds=config.train.join_seconds,
            timeout_seconds=config.train.timeout_seconds,
        )
        limits = WatchLimits(
            action_seconds=config.train.timeout_seconds, stop_seconds=config.checkpoint.stop_seconds
        )
        # torchrun's agent may host the store in a process of its own.
        store_rank = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        with PeerWatch(
            run_store(),
            place.rank,
            place.world_size,
            inbox=inbox,
            store_rank=store_rank,
            limits=limits,
            on_end=lambda code, text: last_words.leave(code, text, said=True),
        ) as watch:
            try:
                return train(config, joined.place, joined.device, watch, parsed.resume, parsed.restarts)
            except (CheckpointError, DivergedError) as error:
                # Raised on all ranks alike: nobody has to be told, and all leave in order.
                code = ExitCode.DIVERGED if isinstance(error, DivergedError) else ExitCode.USAGE
                return last_words.leave(code, str(error))
    except RollCallError as error:
        # Every rank has the sentence; the one that found out leaves it to the user.
        return last_words.leave(ExitCode.USAGE, str(error)) if error.author else int(ExitCode.USAGE)
    except ValueError as error:
        return last_words.leave(ExitCode.USAGE, str(error))
    except Exception as error:
        # Whatever it was, the other ranks know already (PeerWatch); here the user learns where.
        traceback.print_exc()
        left = last_words.leave(ExitCode.ERROR, f"{type(error).__name__}: {error}", said=True)
        abandon()
        return left
    finally:
        inbox.close()
        destroy()


def train(
    config: RunConfig,
    place: Place,
    device: torch.device,
    watch: PeerWatch,
    resume: str | None = None,
    num_restarts: int = 0,
) -> ExitCode:
    """Build this rank's part of the run, bring it to where it was, and make all steps that are left."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, place.rank)
    topology.check_world_size(place.world_size)
    programs = plan_run(config)
    watch.report_action("opening the corpus", may_take_seconds=OPENING_SECONDS)
    tokens = open_tokens(config.data, default_cache_folder())
    check_vocabulary(tokens, config.model.vocab_size)
    check_agreement(run_facts(programs, tokens.fingerprint))

    groups = ProcessGroups.build(
        topology,
        config.train.timeout_seconds,
        programs.training.links,
        save_seconds=config.checkpoint.timeout_seconds,
    )
    worker = Worker.build(config, programs, topology, groups, device, watch.report_action)
    state = RankState(worker.stage, worker.engine, topology, device)
    keeper = CheckpointKeeper(config, state, groups.checkpoints, tokens.fingerprint, watch.report_action)
    num_validated = config.sequences_per_step * config.train.validation_batches
    windows = ValidationWindows(tokens.validation, config.data.sequence_length, num_validated)

    def batches(progress: Progress) -> Batches:
        done = (progress.step, progress.num_sequences)
        sizes = (config.data.sequence_length, config.data.seed, config.sequences_per_step)
        return Batches(tokens.train, *sizes, done)

    resumed = keeper.start() if resume is None else keeper.resume(resume)
    if resumed.progress.step > config.train.steps:
        raise CheckpointError(
            f"the checkpoint is of step {resumed.progress.step}, train.steps={config.train.steps}. Raise"
            " train.steps, or resume from an earlier step."
        )
    work = Work(model_flops_per_token(config), device_peak_flops(config))
    with RunReporter(
        config,
        topology,
        place.local_rank,
        place.local_world_size,
        device,
        work,
        lambda: watch.current_action,
        resumed.progress.step,
        num_restarts,
    ) as reporter:
        for sentence in (describe(config, programs, tokens.description, device), *resumed.told):
            reporter.announce(sentence)
        if worker.warm_up_seconds:
            limit = worker.warm_up_seconds
            reporter.announce(f"compiling {config.kernels.backend} before step 1, for {limit:.0f} s at most")
            start = time.perf_counter()
            watch.report_action("compiling", may_take_seconds=limit)
            worker.warm_up()
            reporter.announce(f"compiled in {time.perf_counter() - start:.0f} s")
        try:
            ended = make_steps(worker, keeper, batches, windows, reporter, watch, resumed.progress)
        except CheckpointError:
            raise
        except ValueError as error:
            # What a user wrote was checked before the first step: this is a defect, and shows where it is.
            raise RuntimeError(f"while training: {error}") from error
        if ended.code is not ExitCode.OK:
            return ended.code
        if place.rank == 0:
            # Now, not at the start, where every rank would wait for it.
            watch.report_action("counting pairs of tokens", may_take_seconds=OPENING_SECONDS)
            bigram = Bigram(tokens.train, config.model.vocab_size)
            reporter.finish(bigram.loss(*windows.sequences(0, windows.num_sequences)))
    worker.engine.close()
    return ExitCode.OK


class Ended(NamedTuple):
    """How far the steps came, and why no further."""

    progress: Progress
    code: ExitCode


def make_steps(
    worker: Worker,
    keeper: CheckpointKeeper,
    batches_from: Callable[[Progress], Batches],
    windows: ValidationWindows,
    reporter: RunReporter,
    watch: PeerWatch,
    progress: Progress,
) -> Ended:
    """All steps from `progress` to the last one, or to a request to stop; the state at the end is saved."""
    config = worker.config
    skipped = NonfiniteGuard(config.guard.max_nonfinite_steps, config.guard.max_rollbacks)
    spikes = SpikeDetector(config.guard.spike_window, config.guard.spike_threshold)
    batches, stop, rate = batches_from(progress), None, 0.0
    while progress.step < config.train.steps and stop is None:
        watch.report_action(f"reading the text of step {progress.step + 1}")
        figures = train_step(worker, batches, progress.step, watch.stop_kind)
        progress, stop, rate = after(progress, worker), figures.stop, figures.learning_rate
        reporter.trace(figures)
        due = is_due(progress.step, config.train.validate_every, config.train.steps)
        validation_loss = validate(worker, windows) if due and stop is None else None
        reporter.step(figures, validation_loss)
        worker.engine.write_monitors(monitored(figures, validation_loss), figures.step)
        if spike := spikes.judge(figures.loss):
            reporter.spike(figures.step, spike)
        if skipped.must_roll_back(figures.applied):
            progress = roll_back(keeper, skipped, reporter, progress)
            batches = batches_from(progress)
        else:
            reporter.saved(keeper.after_step(progress, rate, applied=figures.applied))
    saves = keeper.last(progress, rate)
    reporter.saved(saves)
    lost = any(save.failure is not None and save.step == progress.step for save in saves)
    if stop is not None:
        reporter.announce(f"stopped after step {progress.step} of {config.train.steps} on request")
    if lost:
        reporter.announce("the last checkpoint could not be written: see above")
    code = ExitCode.UNSAVED if lost else stop.exit_code if stop is not None else ExitCode.OK
    return Ended(progress, code)


def roll_back(
    keeper: CheckpointKeeper, skipped: NonfiniteGuard, reporter: RunReporter, progress: Progress
) -> Progress:
    """Return to the last checkpoint, all ranks alike. Raises DivergedError when that is no use any more."""
    resumed, saves = keeper.roll_back(progress)
    reporter.saved(saves)
    skipped.rolled_back(None if resumed is None else resumed.progress.step)
    assert resumed is not None
    reporter.rolled_back(resumed.progress.step)
    for sentence in resumed.told:
        reporter.announce(sentence)
    return resumed.progress


def after(progress: Progress, worker: Worker) -> Progress:
    """One step further."""
    return Progress(
        step=progress.step + 1,
        num_updates=worker.engine.num_updates,
        num_sequences=progress.num_sequences + worker.config.sequences_per_step,
        num_tokens=progress.num_tokens + worker.config.tokens_per_step,
    )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens after `step`."""
    return step == last or (every > 0 and step % every == 0)


def train_step(worker: Worker, batches: Batches, step: int, stop: StopKind | None = None) -> StepFigures:
    """One optimizer step over the global batch of `step` (counted from 0).

    `stop`: this rank was asked to stop; the figures say whether any rank was.
    """
    start = time.perf_counter()
    microbatches = worker.microbatches(lambda first, count: batches.sequences(step, first, count))
    data_seconds = time.perf_counter() - start
    worker.stability.arm(step + 1)
    output = worker.executor.run(worker.programs.training, microbatches, worker)
    stability = worker.stability.take()
    outcome = worker.take_outcome()
    verdict = worker.agree(output.losses, stop)
    rate = worker.config.model.balance_rate if outcome.applied else 0.0
    load_ratios = balance_routers((router for _, router in worker.stage.routers()), rate, worker.groups.data)
    return StepFigures(
        step=step + 1,
        loss=verdict.loss,
        grad_norm=outcome.grad_norm,
        learning_rate=outcome.learning_rate,
        applied=outcome.applied,
        loss_finite=outcome.losses_finite,
        stop=verdict.stop,
        num_tokens=worker.config.tokens_per_step,
        seconds=time.perf_counter() - start,
        data_seconds=data_seconds,
        load_max_to_mean_ratio=max(load_ratios, default=None),
        trace=output.trace,
        reduction=outcome.reduction,
        stability=stability,
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


def start_facts(config: RunConfig) -> dict[str, str]:
    """What has to be equal on all ranks before anything is computed."""
    digest = hashlib.blake2b(dump_config(config).encode(), digest_size=8).hexdigest()
    return {"the configuration": digest, "the code": code_hash(), **versions()}


def run_facts(programs: RunPrograms, corpus: str) -> dict[str, str]:
    """What has to be equal on all ranks before the first step."""
    return {
        "the program of a step": programs.training.digest(),
        "the program of an evaluation": programs.evaluation.digest(),
        "the corpus": corpus,
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


if __name__ == "__main__":
    sys.exit(main())
