"""What a user sees, on a terminal and in a log file."""

import io

from rich.console import Console

from mhc_dist.observe.progress import TrainProgress, _count, _duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_a_line_now_and_then() -> None:
    """Oracle: 100 steps of one second: first, last, a validation, and one line every ten seconds."""
    output, clock = io.StringIO(), Clock()
    with TrainProgress(100, console=Console(file=output), clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(step, loss=4.0 - step / 100, tokens_per_second=12_345.0)
            if step == 50:
                clock.now += 7.0
                progress.validation(step, 3.25)
    lines = output.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[0] == "step 1/100  loss 3.9900  12.3k tokens/s  1:39 to go"
    assert "step 50/100  validation loss 3.2500" in lines
    assert lines[-1] == "step 100/100  loss 3.0000  validation 3.2500  12.3k tokens/s  0:00 to go"
    assert "\x1b" not in output.getvalue()


def test_a_terminal_gets_a_live_line() -> None:
    """Oracle: the last drawn line has the numbers, and the cursor was moved rather than lines added."""
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=True, width=120)
    with TrainProgress(10, first_step=4, console=console, clock=clock) as progress:
        for step in range(5, 11):
            clock.now += 2.0
            progress.update(step, loss=2.5, tokens_per_second=2.5e6)
        progress.message("metrics port 9400 is taken: serving on [9402] instead")
    text = output.getvalue()
    assert "10/10" in text
    assert "loss 2.5000  2.5M tokens/s  0:00 to go" in text
    assert "serving on [9402] instead" in text
    assert "\x1b[" in text


def test_time_to_go_forgets_the_slow_first_step() -> None:
    """Oracle: a first step of 100 s and nine of 1 s leave 10 s for the last ten steps."""
    output, clock = io.StringIO(), Clock()
    progress = TrainProgress(20, console=Console(file=output), clock=clock)
    clock.now += 100.0
    progress.update(1, 1.0, 1.0)
    for step in range(2, 11):
        clock.now += 1.0
        progress.update(step, 1.0, 1.0)
    progress.validation(10, 1.0)
    clock.now += 10.0
    progress.update(11, 1.0, 1.0)
    assert output.getvalue().splitlines()[-1].endswith("0:17 to go")


def test_numbers_are_written_for_people() -> None:
    """Oracle: by hand."""
    assert [_count(number) for number in (7, 999, 1000, 2.5e6, 3.1e9)] == ["7", "999", "1.0k", "2.5M", "3.1G"]
    seconds = (0.4, 61, 3600, 90_061)
    assert [_duration(number) for number in seconds] == ["0:00", "1:01", "1:00:00", "1d 1:01:01"]
