"""Where a figure comes from: written into every report, so that a number can be traced and repeated."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def provenance(module: str) -> dict[str, object]:
    """Command, time, commit, machine and versions; `load_average` says how busy the machine was."""
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": version("torch"),
        "triton": version("triton"),
    }


def _commit() -> str:
    """Short commit of this file's checkout, `+` when files differ from it; `unknown` without git."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
