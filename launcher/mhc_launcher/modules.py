"""Hand a command over to the module that does it, which needs torch or numpy; this process does not."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mhc_launcher.children import run_group

STOP_SECONDS = 5.0
"""How long a module may take to clear up after a request to stop. Whatever it started ends with it."""


def run_module(module: str, arguments: Sequence[str]) -> int:
    """`python -m module arguments` to its end; returns the exit code.

    A Ctrl-C (or SIGTERM) ends the module and all its processes; a second one does not wait for them. Then the
    code is 128 plus the signal's number, as a shell has it.
    """
    # One thread a process, set before torch is imported: processes that run side by side, such as two ranks
    # on two cores, must not fight for them.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    ended = run_group(command, environment, lambda _: False, stop_seconds=STOP_SECONDS)
    if ended.stopped_by is None:
        return ended.exit_code
    print(f"mhc-dist: stopped by {ended.stopped_by.name}.", file=sys.stderr, flush=True)
    return 128 + ended.stopped_by
