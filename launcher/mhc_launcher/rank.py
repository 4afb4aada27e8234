"""Become one rank of a run that srun, mpirun, torchrun or a pod has started: `--launcher none`.

The trainer runs in this very process, so that signals of whoever started it arrive without a detour.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

from mhc_dist.config import RunConfig, dump_config
from mhc_dist.parallel.cuda_settings import cuda_settings
from mhc_dist.plan.run_programs import plan_run
from mhc_launcher import run_folder
from mhc_launcher.attempts import trainer_arguments
from mhc_launcher.bootstrap import Source, read_rank_environment
from mhc_launcher.devices import Backend, visible_gpus
from mhc_launcher.local import check_tokens


def become_rank(config: RunConfig, trainer: str, resume: str | None = None) -> int:
    """Run `trainer` as the rank that the environment names; returns its exit code.

    Rank 0 makes the run's folder and ends with the summary on stdout. Raises ValueError when the environment
    names no rank, or not as many as the run has.
    """
    place = read_rank_environment()
    sizes = config.parallel
    if place.world_size != config.num_processes:
        seen = (
            "nothing in this environment names a rank"
            if place.source is Source.SINGLE
            else f"{place.source.value} variables name {place.world_size} processes"
        )
        raise ValueError(
            f"{seen}, but parallel.pipeline={sizes.pipeline} x parallel.data={sizes.data} needs"
            f" {config.num_processes}. With --launcher none every process is started by somebody else (srun,"
            f" mpirun -n {config.num_processes}, torchrun --no-python); without it, mhc-dist starts them."
        )
    if place.rank != 0:
        with tempfile.TemporaryDirectory(prefix="mhc-dist-") as folder:
            path = Path(folder) / run_folder.CONFIG_FILE
            path.write_text(dump_config(config))
            return _run(trainer, config.train.backend, path, resume)
    with run_folder.reserved(config):
        plan_run(config)
        check_tokens(config)
        if moved := run_folder.prepare(config, resume):
            print(f"An earlier run is kept in {moved}.", flush=True)
        code = _run(trainer, config.train.backend, config.folder / run_folder.CONFIG_FILE, resume)
        summary = run_folder.read_summary(config.folder)
        if summary is None:
            return code or 1
        print(json.dumps(summary), flush=True)
        return 0


def _run(trainer: str, backend: Backend, config_file: Path, resume: str | None) -> int:
    sys.argv = [trainer, "--config", str(config_file), *trainer_arguments(resume, 0)]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if backend != "gloo" and visible_gpus():
        os.environ.update(cuda_settings(os.environ))
    try:
        # By name: this package does not import torch, the trainer does.
        runpy.run_module(trainer, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0
