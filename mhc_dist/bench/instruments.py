"""`mhc-dist bench instruments`: what watching a run costs: metrics, exporter, logs, stability measurements.

One process and one thread. All that instruments do is timed where it is done, in processor time: taking
samples in the forward pass, making figures of them, metrics and logs, and answering a scrape every second,
five times as often as configs/prometheus asks. Their sum over a step's time is the cost. As a check, blocks
of steps with everything switched on and with nothing take turns within the run; their ratio has an interval
of its own, which is wide wherever cores are shared.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import tempfile
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any

import torch
from torch import Tensor

from mhc_dist.bench.alone import Nobody, random_microbatches, whole_stage
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.peers.ratio import paired_ratio
from mhc_dist.config import RunConfig
from mhc_dist.model.hyper_connection import Mix, MixProbe
from mhc_dist.observe.reporter import RunReporter, StepFigures
from mhc_dist.observe.stability import StabilityProbe
from mhc_dist.optim.reduction import Reduction
from mhc_dist.pipeline.action import Action
from mhc_dist.pipeline.executor import Executor
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology

SCRAPE_SECONDS = 1.0
NUM_TIMED_SCRAPES = 50


class _Clock:
    """Processor seconds of the calling thread, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        start = thread_time()
        yield
        self.seconds[what] += thread_time() - start


class _ClockedProbe:
    """A probe, and the time it takes."""

    def __init__(self, probe: MixProbe, clock: _Clock) -> None:
        self._probe, self._clock = probe, clock

    def entered(self, sublayer: int, streams_TNC: Tensor, pre_TN: Tensor, mix: Mix) -> None:
        with self._clock.on("sampling"):
            self._probe.entered(sublayer, streams_TNC, pre_TN, mix)


class _Steps:
    """Steps of the whole model on this process, watched or not."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._programs = config, plan_run(config)
        self._stage = whole_stage(config, self._programs)
        self._microbatches = random_microbatches(config)
        self._holders = {index: chunk.tape_holder for index, chunk in self._stage.by_index.items()}
        self._probe = StabilityProbe(self._holders, config.observe.stability_every)
        self.clock = _Clock()
        self._action: Action | None = None
        self._step = 0

    def plain(self, num_steps: int) -> float:
        """Processor seconds of so many steps that nobody watches."""
        start = process_time()
        for _ in range(num_steps):
            self._stage.zero_grad(set_to_none=True)
            nobody = Nobody()
            Executor(0, self._stage.by_index, nobody).run(self._programs.training, self._microbatches, nobody)
        return process_time() - start

    def watched(self, num_steps: int, reporter: RunReporter) -> float:
        """Processor seconds of so many steps with all instruments."""
        start = process_time()
        for _ in range(num_steps):
            self._step += 1
            begin = perf_counter()
            self._stage.zero_grad(set_to_none=True)
            self._probe.arm(self._step)
            for holder in self._holders.values():
                if holder.probe is not None:
                    holder.probe = _ClockedProbe(holder.probe, self.clock)
            nobody = Nobody()
            executor = Executor(0, self._stage.by_index, nobody, self._note)
            output = executor.run(self._programs.training, self._microbatches, nobody)
            loss = torch.stack(output.losses).mean().item()
            with self.clock.on("figures"):
                stability = self._probe.take()
            figures = StepFigures(
                step=self._step,
                loss=loss,
                grad_norm=1.0,
                learning_rate=1e-3,
                applied=True,
                loss_finite=True,
                stop=None,
                num_tokens=self._config.tokens_per_step,
                seconds=perf_counter() - begin,
                data_seconds=0.0,
                load_max_to_mean_ratio=1.0,
                trace=output.trace,
                reduction=Reduction(),
                stability=stability,
            )
            with self.clock.on("metrics_and_logs"):
                reporter.step(figures)
        return process_time() - start

    def current_action(self) -> tuple[str, float]:
        return str(self._action), 0.0

    def _note(self, action: Action) -> None:
        self._action = action


@contextlib.contextmanager
def _scraped(port: int) -> Iterator[None]:
    """Somebody fetches /metrics every second. The fetching itself counts, too, as it is this process's."""
    over = threading.Event()

    def keep_scraping() -> None:
        while not over.wait(SCRAPE_SECONDS):
            _scrape(port)

    thread = threading.Thread(target=keep_scraping, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _scrape(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        answer.read()


def _seconds_per_scrape(port: int) -> float:
    """While nothing else runs in this process; with the asking, which a cluster's ranks are spared."""
    start = process_time()
    for _ in range(NUM_TIMED_SCRAPES):
        _scrape(port)
    return (process_time() - start) / NUM_TIMED_SCRAPES


def run(config: RunConfig, rounds: int, steps: int) -> dict[str, Any]:
    """Figures of `rounds` pairs of blocks of `steps` steps."""
    if rounds < 1 or steps < 1:
        raise ValueError(f"rounds={rounds} and steps={steps} must be at least 1.")
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as output:
        config = _alone(config, Path(output), port)
        stepper = _Steps(config)
        plain: list[float] = []
        watched: list[float] = []
        stepper.plain(1)
        with RunReporter(
            config, Topology(1, 1, 1, 0), 0, 1, torch.device("cpu"), None, stepper.current_action
        ) as reporter:
            for turn in range(rounds):
                for first in (True, False) if turn % 2 else (False, True):
                    if first:
                        plain.append(stepper.plain(steps))
                    else:
                        with _scraped(port):
                            watched.append(stepper.watched(steps, reporter))
            seconds_per_scrape = _seconds_per_scrape(port)
    seconds_per_step = median(plain) / steps
    parts = {
        what: spent / (rounds * steps) / seconds_per_step for what, spent in stepper.clock.seconds.items()
    }
    parts["scrapes"] = seconds_per_scrape / SCRAPE_SECONDS
    return {
        "cost_ratio": sum(parts.values()),
        "cost_parts": parts,
        "paired_step_ratio": asdict(paired_ratio(watched, plain)),
        "seconds_per_step": seconds_per_step,
        "steps_per_block": steps,
        "rounds": rounds,
        "stability_every": config.observe.stability_every,
        "scrape_seconds": SCRAPE_SECONDS,
        "tokens_per_step": config.tokens_per_step,
    }


def _alone(config: RunConfig, output: Path, port: int) -> RunConfig:
    """The run on one process, writing to `output`."""
    update = {
        "parallel": config.parallel.model_copy(update={"pipeline": 1, "data": 1, "expert": 1}),
        "schedule": config.schedule.model_copy(update={"cluster": None, "boundaries": "auto"}),
        "train": config.train.model_copy(update={"output": output, "name": "instruments"}),
        "observe": config.observe.model_copy(update={"metrics_port": port}),
    }
    return RunConfig.model_validate(config.model_copy(update=update).model_dump())


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="pairs of blocks (7)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block (10)")


def _table(figures: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{what.replace('_', ' ')} {share:.2%}" for what, share in figures["cost_parts"].items()
    )
    paired = figures["paired_step_ratio"]
    return (
        f"instruments cost {figures['cost_ratio']:.2%} of a step: {parts}\n"
        f"steps with and without them in turn: {paired['median'] - 1:+.1%}"
        f" ({paired['low'] - 1:+.1%} to {paired['high'] - 1:+.1%})"
    )


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    figures = run(config, options.rounds, options.steps)
    label = "measured: processor time of one process, one thread, CPU"
    return Outcome("instruments", label, figures, _table(figures))


BENCH = Bench("instruments", __doc__, _add_options, _measure)

if __name__ == "__main__":
    BENCH.main()
