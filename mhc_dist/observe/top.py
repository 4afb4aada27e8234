"""`mhc-dist top`: every rank of a running run in one live table, asked over HTTP, nothing collective."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mhc_dist.observe.exporter import STATUS_PATH
from mhc_dist.observe.target_file import TARGETS_FOLDER

ANSWER_SECONDS = 2.0
LONG_ACTION_SECONDS = 5.0
"""An action that has lasted this long is shown in colour: most take milliseconds."""
WIDE = 120
"""Columns of text that all headings and what a rank does fit into."""


@dataclass(frozen=True)
class Target:
    """Where one rank serves."""

    rank: int
    address: str


def find_targets(run: Path) -> list[Target]:
    """The ranks of the run in folder `run`, in order. Raises ValueError when none is announced."""
    folder, name = run.parent / TARGETS_FOLDER, run.name
    targets = []
    for path in folder.glob(f"{name}.*.json"):
        rank = path.name[len(name) + 1 : -len(".json")]
        # A run called `a` must not take the ranks of a run called `a.b`.
        if rank.isdigit():
            (entry,) = json.loads(path.read_text(encoding="utf-8"))
            targets.append(Target(int(rank), entry["targets"][0]))
    if not targets:
        raise ValueError(
            f"no rank of {run} serves metrics: the run has ended or has not started, or"
            " observe.metrics_port is 0. Give the folder of a run that is going on, such as runs/tiny."
        )
    return sorted(targets, key=lambda target: target.rank)


def ask(targets: Sequence[Target]) -> list[dict[str, Any] | None]:
    """What each rank says of itself; None for one that does not answer within two seconds."""
    with ThreadPoolExecutor(max_workers=min(64, len(targets))) as pool:
        return list(pool.map(_ask_one, targets))


def _ask_one(target: Target) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(
            f"http://{target.address}{STATUS_PATH}", timeout=ANSWER_SECONDS
        ) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (urllib.error.URLError, TimeoutError, json.JSONDecodeError, ConnectionError):
        return None


def table(
    run: Path, targets: Sequence[Target], answers: Sequence[dict[str, Any] | None], width: int
) -> Table:
    """The ranks as a table: what each does now, and how its last step was spent. `width` columns of text are
    there: below WIDE, one column says where a rank is (stage, data, expert), and headings are short.
    """
    steps = [answer["step"] for answer in answers if answer and answer["step"] is not None]
    title = f"{run.name}: " + (f"step {max(steps)}" if steps else "no step yet")
    wide = width >= WIDE
    result = Table(title=title, title_justify="left", header_style="bold")
    if not wide:
        result = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1, 0, 0))
    places = ("stage", "data", "expert") if wide else ("s/d/e",)
    result.add_column("rank", justify="right", no_wrap=True)
    result.add_column("node", no_wrap=True)
    for name in places:
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("doing", ratio=1, no_wrap=True)
    shares = ("computing", "all-to-all", "p2p", "bubble") if wide else ("comp", "a2a", "p2p", "bub")
    for name in ("since", *(["step"] if wide else []), "took", *shares):
        result.add_column(name, justify="right", no_wrap=True)
    for target, answer in zip(targets, answers, strict=True):
        if answer is None:
            nowhere = "-" * len(places)
            node = target.address.rpartition(":")[0]
            result.add_row(str(target.rank), node, *nowhere, Text("no answer", style="bold red"))
            continue
        where = [str(answer[name]) for name in ("stage", "data_rank", "expert_rank")]
        seconds = answer["action_seconds"]
        slow = seconds is not None and seconds > LONG_ACTION_SECONDS
        step = "" if answer["step"] is None else str(answer["step"])
        result.add_row(
            str(answer["rank"]),
            str(answer["node"]),
            *(where if wide else ["/".join(where)]),
            Text(str(answer["action"]), style="yellow" if slow else ""),
            Text("" if seconds is None else f"{seconds:.1f} s", style="yellow" if slow else ""),
            *([step] if wide else []),
            "" if answer["step"] is None else f"{answer['step_seconds']:.2f} s",
            *(
                "" if answer["step"] is None else f"{answer[share]:.0%}"
                for share in ("computing", "exposed_all_to_all", "exposed_p2p", "bubble")
            ),
        )
    return result


def watch(
    run: Path, interval_seconds: float, console: Console, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Redraw the table until the run ends or the user interrupts. Raises ValueError when no rank serves."""
    targets = find_targets(run)
    shown = table(run, targets, ask(targets), console.width)
    with Live(shown, console=console, screen=False, auto_refresh=False) as live:
        while True:
            sleep(interval_seconds)
            try:
                targets = find_targets(run)
            except ValueError:
                return
            live.update(table(run, targets, ask(targets), console.width), refresh=True)
