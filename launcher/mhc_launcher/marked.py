"""The processes of one launch on this host, known by a mark in their environment.

A name or a command line may be another run's; a number may have been given anew. The mark is unique to a
launch, and everything the launch starts inherits it.

    python -m mhc_launcher.marked MARK stop TRAINER SIGTERM   ask the ranks to end in order, by a signal
    python -m mhc_launcher.marked MARK end                    end everything that is left
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import psutil

VARIABLE = "MHC_DIST_LAUNCH"
GRACE_SECONDS = 5.0
"""Between the request to end and the end by force."""


def processes(mark: str) -> list[psutil.Process]:
    """All processes that carry the mark, this one excepted."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def is_rank(command: Sequence[str], trainer: str) -> bool:
    """Whether a command line is a rank's: the launchers' own processes name the trainer, too, but later."""
    by_module = list(command[1:4]) == ["-u", "-m", trainer]
    by_file = (
        len(command) > 2 and command[1] == "-u" and command[2].endswith(f"/{trainer.replace('.', '/')}.py")
    )
    return by_module or by_file


def ask_ranks_to_stop(mark: str, trainer: str, number: signal.Signals = signal.SIGTERM) -> int:
    """A signal to the ranks of the launch on this host; returns how many there are."""
    num_asked = 0
    for process in processes(mark):
        try:
            if is_rank(process.cmdline(), trainer):
                process.send_signal(number)
                num_asked += 1
        except psutil.NoSuchProcess:
            continue
    return num_asked


def end_all(mark: str) -> int:
    """End everything of the launch on this host, by force where needed; returns how many there were."""
    left = processes(mark)
    for process in left:
        _signal(process, force=False)
    _, alive = psutil.wait_procs(left, timeout=GRACE_SECONDS)
    for process in alive:
        _signal(process, force=True)
    return len(left)


def _signal(process: psutil.Process, *, force: bool) -> None:
    try:
        process.kill() if force else process.terminate()
    except psutil.NoSuchProcess:
        return


def main(arguments: Sequence[str]) -> int:
    match list(arguments):
        case [mark, "stop", trainer, name]:
            print(ask_ranks_to_stop(mark, trainer, signal.Signals[name]))
        case [mark, "end"]:
            print(end_all(mark))
        case _:
            raise SystemExit(
                f"arguments {list(arguments)}: MARK stop TRAINER SIGNAL, or MARK end, are expected"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
