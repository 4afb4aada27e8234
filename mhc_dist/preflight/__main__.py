"""Every rank of a preflight: look, measure, and on rank 0 tell.

mpirun -n 4 mhc-dist preflight --output cluster.yaml
torchrun --no-python --nproc-per-node 4 mhc-dist preflight
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mhc_launcher.bootstrap import RankEnvironment, Source, read_rank_environment
from mhc_launcher.interfaces import network_settings
from rich.console import Console

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.preflight import measure
from mhc_dist.preflight.cluster_file import cluster, cluster_text
from mhc_dist.preflight.communicator import Communicator
from mhc_dist.preflight.facts import look
from mhc_dist.preflight.findings import Report, findings
from mhc_dist.preflight.table import show


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when there is nothing to worry about or only warnings; 2 when it cannot be done."""
    parser = argparse.ArgumentParser(prog="mhc-dist preflight", description=__doc__)
    parser.add_argument("--output", type=Path, help="write a cluster file for `mhc-dist plan --cluster`")
    parser.add_argument("--name", default="surveyed", help="name of the cluster in that file")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will be written")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest time for pairs of ranks")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when there is a warning")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    try:
        place = read_rank_environment()
        world = communicator(place)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    report = survey(world, place, options.folder, options.seconds)
    found = findings(report)
    if world.rank == 0:
        # A table in a log file is as wide as it needs to be.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
        show(report, found, console)
        if options.output is not None:
            options.output.write_text(cluster_text(cluster(report, options.name)))
            console.print(f"written to {options.output}: mhc-dist plan CONFIG --cluster {options.output}")
    world.close()
    return int(bool(found) and options.strict)


def communicator(place: RankEnvironment) -> Communicator:
    """MPI's messages under mpirun, torch's elsewhere: what started us decides, and the report says it."""
    if place.source is Source.MPI:
        # Imported here alone: importing it starts MPI.
        from mhc_dist.preflight.with_mpi import MpiCommunicator

        return MpiCommunicator()
    from mhc_dist.preflight.with_torch import TorchCommunicator

    several_hosts = place.local_world_size < place.world_size
    os.environ.update(network_settings(os.environ, place.master_addr, several_hosts))
    return TorchCommunicator(place)


def survey(world: Communicator, place: RankEnvironment, folder: Path, pair_seconds: float) -> Report:
    """Look and measure; collective over the world."""
    began = time.monotonic()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", place.local_rank % gpus) if gpus else torch.device("cpu")
    facts = world.gather(look(world.rank, place.node, folder))
    skew = measure.clock_skew(world)
    links = measure.pair_links(world, pair_seconds) if world.size > 1 else []
    exchanges = measure.all_to_alls(world) if world.size > 1 else []
    world.barrier()
    speed = world.gather(measure.compute(device))
    return Report(world.library, facts, skew, links, exchanges, speed, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
