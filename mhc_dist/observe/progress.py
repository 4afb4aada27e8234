"""How a run looks on the terminal of rank 0: a live line with a bar, or plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

PLAIN_INTERVAL_SECONDS = 10.0
RATE_MEMORY = 0.9
"""Weight of the past in the running mean of step times: about the last ten steps."""


class TrainProgress:
    """Shows step, loss, validation loss, tokens per second and time to go. A context manager.

    On a terminal one line is redrawn in place. Elsewhere a line is printed for the first and the last step,
    every validation, and in between every ten seconds.

    Args:
        num_steps: the step the run ends with.
        first_step: steps done before this process started (resume).
        console: where to; by default stderr, since stdout ends with the run's JSON summary.
        clock: seconds, replaced in tests.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._first_step = first_step
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._step_seconds: float | None = None
        self._last_update = clock()
        self._last_line: float | None = None
        self._validation_loss: float | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "train", total=self._num_steps, completed=self._first_step, text="starting"
            )
            self._bar.start()
        self._last_update = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Step `step` (counted from 1) is done."""
        now = self._clock()
        seconds = now - self._last_update
        self._last_update = now
        if self._step_seconds is None or step <= self._first_step + 2:
            # The first step also warms up caches and allocators: forget it as soon as there is a second.
            self._step_seconds = seconds
        else:
            self._step_seconds = RATE_MEMORY * self._step_seconds + (1 - RATE_MEMORY) * seconds
        to_go = (self._num_steps - step) * self._step_seconds
        text = f"loss {loss:.4f}"
        if self._validation_loss is not None:
            text += f"  validation {self._validation_loss:.4f}"
        text += f"  {_count(tokens_per_second)} tokens/s  {_duration(to_go)} to go"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        is_first_or_last = step == self._first_step + 1 or step == self._num_steps
        if is_first_or_last or self._last_line is None or now - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            self._print(f"step {step}/{self._num_steps}  {text}")

    def validation(self, step: int, loss: float) -> None:
        """A validation after step `step` gave `loss`. Its time does not count as a step's."""
        self._validation_loss = loss
        self._last_update = self._clock()
        self._print(f"step {step}/{self._num_steps}  validation loss {loss:.4f}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, minutes, rest = rest // 3600, rest // 60 % 60, rest % 60
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days}d {clock}" if days else clock
