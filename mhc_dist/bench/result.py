"""A measurement as a file: figures with their label, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of the file's form, for those who read it (`mhc_dist/results`). Another form is another number."""


def shown_command(name: str, arguments: Sequence[str] | None) -> str:
    """The command that measures, as typed; `arguments` None means those of this process."""
    return shlex.join(["mhc-dist", "bench", name, *(sys.argv[1:] if arguments is None else arguments)])


def conditions() -> dict[str, Any]:
    """Machine, load, versions and commit of this moment."""
    import torch

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(name: str, folder: Path, command: str, label: str, figures: dict[str, Any]) -> Path:
    """Write folder/NAME.json. `label`: measured, derived, simulated or emulated link, and what is meant."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {
        "schema": SCHEMA,
        "command": command,
        "label": label,
        "conditions": conditions(),
        "figures": figures,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def _commit() -> str:
    """The commit of the source, with a mark when files differ from it; `unknown` outside a checkout."""
    try:
        folder = Path(__file__).parent
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--", folder.parent) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", "-C", str(folder), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
