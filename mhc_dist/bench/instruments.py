"""`mhc-dist bench instruments`: what watching a run costs: metrics, exporter, logs, stability measurements.

One process and one thread, blocks of steps in turn within one run, with everything switched on as the
configuration says and with nothing. The exporter is scraped every second, five times as often as
configs/prometheus asks. Processor time, exporter thread included, so that other processes do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from mhc_dist.bench.alone import Nobody, random_microbatches, whole_stage
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.peers.ratio import paired_ratio
from mhc_dist.config import RunConfig
from mhc_dist.observe.reporter import RunReporter, StepFigures
from mhc_dist.observe.stability import StabilityProbe
from mhc_dist.optim.reduction import Reduction
from mhc_dist.pipeline.action import Action
from mhc_dist.pipeline.executor import Executor
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology

SCRAPE_SECONDS = 1.0


class _Steps:
    """Steps of the whole model on this process, watched or not."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._programs = config, plan_run(config)
        self._stage = whole_stage(config, self._programs)
        self._microbatches = random_microbatches(config)
        self._probe = StabilityProbe(
            {index: chunk.tape_holder for index, chunk in self._stage.by_index.items()},
            config.observe.stability_every,
        )
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
            nobody = Nobody()
            executor = Executor(0, self._stage.by_index, nobody, self._note)
            output = executor.run(self._programs.training, self._microbatches, nobody)
            loss = torch.stack(output.losses).mean().item()
            reporter.step(
                StepFigures(
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
                    stability=self._probe.take(),
                )
            )
        return process_time() - start

    def current_action(self) -> tuple[str, float]:
        return str(self._action), 0.0

    def _note(self, action: Action) -> None:
        self._action = action


@contextlib.contextmanager
def _scraped(port: int) -> Iterator[None]:
    """Somebody fetches /metrics every second. The fetching itself counts, too, as it is this process's."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_SECONDS):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                answer.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
    ratio = paired_ratio(watched, plain)
    return {
        "cost_ratio": ratio.median - 1.0,
        "cost_interval": [ratio.low - 1.0, ratio.high - 1.0],
        "step_ratio": asdict(ratio),
        "seconds_per_step": median(plain) / steps,
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
    low, high = figures["cost_interval"]
    return f"instruments cost {figures['cost_ratio']:+.2%} ({low:+.2%} to {high:+.2%}) of a step"


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    figures = run(config, options.rounds, options.steps)
    label = "measured: processor time of one process, one thread, CPU"
    return Outcome("instruments", label, figures, _table(figures))


BENCH = Bench("instruments", __doc__, _add_options, _measure)

if __name__ == "__main__":
    BENCH.main()
