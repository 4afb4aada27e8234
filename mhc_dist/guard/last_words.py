"""What a rank leaves behind when it ends early: one file for whoever started the run, one line for the user.

    failure.json   {"rank", "exit_code", "message"} of the rank that failed first

The launcher reads the file and tells the user; a rank says it itself only where nobody does: on another node
without a common file system, or when something else started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mhc_dist.guard.exit_codes import ExitCode

FAILURE_FILE = "failure.json"
REPORTED = "MHC_DIST_REPORTED"
"""Set by a launcher that reads the run's folder and reports what it finds there."""


@dataclass(frozen=True)
class LastWords:
    """Of one rank. `folder` is the run's, which need not exist on this node."""

    folder: Path
    rank: int
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def leave(self, code: ExitCode, message: str, *, said: bool = False) -> int:
        """Write why this rank ends, unless another one did before; returns `code`. Never raises.

        said: the message is on stderr already.
        """
        content = json.dumps({"rank": self.rank, "exit_code": int(code), "message": message})
        path, is_told = self.folder / FAILURE_FILE, said or REPORTED in self.environ
        try:
            with path.open("x") as file:
                file.write(content)
        except FileExistsError:
            return int(code)
        except FileNotFoundError:
            pass  # no folder of the run on this node: the line below is all there is
        except OSError:
            # A full disk: nobody may take an empty file for the end of another.
            is_told = said
            with contextlib.suppress(OSError):
                path.unlink()
        if not is_told:
            print(f"[rank {self.rank}] {message.rstrip('.')}.", file=sys.stderr, flush=True)
        return int(code)
