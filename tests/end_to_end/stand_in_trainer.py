"""What the launcher starts in tests instead of the trainer: a rank that does as STAND_IN says, then ends."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path, required=True)
parser.add_argument("--local_rank", type=int, required=True)
arguments = parser.parse_args()
folder: Path = arguments.config.parent
rank = int(os.environ["RANK"])

names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "DS_ACCELERATOR")
(folder / f"rank{rank}.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))

match os.environ["STAND_IN"]:
    case "succeed":
        if rank == 0:
            (folder / "summary.json").write_text(json.dumps({"run": "stand-in", "steps": 3}))
    case "fail":
        if rank == 1:
            print("rank 1: no more tokens", file=sys.stderr)
            sys.exit(9)
        time.sleep(60)
    case "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(83))
        (folder / f"ready{rank}").touch()
        time.sleep(60)
