"""Start a run's processes, and start them again from the last checkpoint when they crash."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from mhc_dist.checkpoint.folder import FOLDER, committed
from mhc_dist.config import RunConfig
from mhc_dist.guard.exit_codes import ExitCode
from mhc_launcher import run_folder
from mhc_launcher.children import Ended

NO_CRASH = frozenset(
    {
        ExitCode.OK,
        ExitCode.USAGE,
        ExitCode.STOPPED,
        ExitCode.PREEMPTED,
        ExitCode.DIVERGED,
        ExitCode.UNSAVED,
    }
)
"""Ends that the same start would only repeat, or that somebody asked for."""

PAUSE_SECONDS = 1.0
"""Between a crash and the next start: sockets and memory of the dead are given back."""


@dataclass(frozen=True)
class Restarts:
    """resume: what `--resume` asks for. limit: how many crashes are answered by another start."""

    resume: str | None = None
    limit: int = 0


def run_attempts(
    config: RunConfig,
    restarts: Restarts,
    start: Callable[[list[str]], Ended],
    report: Callable[[Ended], int],
) -> int:
    """Start the run, again after each crash, and return its exit code.

    start: runs the processes to their end; gets the trainer's arguments that say where to begin.
    report: tells the user how they ended and returns the exit code.
    """
    resume, num_restarts = restarts.resume, 0
    while True:
        ended = start(trainer_arguments(resume, num_restarts))
        code = report(ended)
        if code in NO_CRASH or ended.stopped_by is not None or num_restarts == restarts.limit:
            return code
        num_restarts += 1
        print(
            f"mhc-dist: restart {num_restarts} of {restarts.limit} of run {config.train.name}"
            f" {_from_where(config)}.",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(PAUSE_SECONDS)
        run_folder.forget_failure(config)
        resume = "auto"


def trainer_arguments(resume: str | None, num_restarts: int) -> list[str]:
    """What a rank is told about the start it takes part in."""
    arguments = [] if resume is None else ["--resume", resume]
    return [*arguments, "--restarts", str(num_restarts)] if num_restarts else arguments


def _from_where(config: RunConfig) -> str:
    steps = committed(config.folder / FOLDER)
    return f"from step {max(steps)}" if steps else "from the start: there is no checkpoint yet"
