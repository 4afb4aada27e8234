"""Train on this host: pipeline x data processes, started by the deepspeed launcher.

Everything a user can have got wrong is checked here, before the first process starts. What the processes say
is passed through; what decides is the summary that rank 0 writes as its last act. An exit code cannot: a
launcher that is killed takes it to its grave.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

from mhc_dist.config import RunConfig
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.parallel.cuda_settings import cuda_settings
from mhc_dist.plan.run_programs import plan_run
from mhc_launcher import run_folder
from mhc_launcher.attempts import Restarts, run_attempts
from mhc_launcher.children import STOP_MARGIN_SECONDS, Ended, run_group
from mhc_launcher.devices import gpus_for_run, threads_per_process
from mhc_launcher.ports import check_master_port, check_metrics_ports, free_port

TRAINER = "mhc_dist.train"


def train_here(
    config: RunConfig,
    master_port: int | None = None,
    trainer: str = TRAINER,
    restarts: Restarts = Restarts(),  # noqa: B008  # frozen
) -> int:
    """Run `config` to its end and return the exit code. Raises ValueError for what cannot be run here.

    On success the last line of stdout is the run's summary, one JSON object.
    """
    with run_folder.reserved(config):
        plan_run(config)
        check_tokens(config)
        if master_port is not None:
            check_master_port(master_port)
        check_metrics_ports(config.observe.metrics_port, config.num_processes)
        gpus = gpus_for_run(config.train.backend, config.num_processes)
        if moved := run_folder.prepare(config, restarts.resume):
            print(f"An earlier run is kept in {moved}.", flush=True)

        def start(arguments: list[str]) -> Ended:
            port = master_port or free_port()
            return run_group(
                [*deepspeed_command(config, port, gpus, trainer), *arguments],
                environment(config.num_processes, gpus),
                lambda command: is_rank(command, trainer),
                stop_seconds=config.checkpoint.stop_seconds + STOP_MARGIN_SECONDS,
            )

        return run_attempts(config, restarts, start, lambda ended: report(config, ended))


def report(config: RunConfig, ended: Ended) -> int:
    """Say how the run ended, from what its ranks left in the run's folder; returns the exit code."""
    code = shell_code(ended.exit_code)
    summary = run_folder.read_summary(config.folder)
    if summary is not None:
        if code:
            _say(config, f"is complete, but its processes ended with exit code {code}")
        print(json.dumps(summary), flush=True)
        return 0
    return tell_end(config, ended, run_folder.read_failure(config.folder))


def tell_end(config: RunConfig, ended: Ended, failure: run_folder.Failure | None = None) -> int:
    """Say how processes ended that did not complete their run; returns the exit code."""
    code = shell_code(ended.exit_code)
    if ended.stopped_by is not None:
        _say(config, f"was stopped by {ended.stopped_by.name}")
        return code or 128 + ended.stopped_by
    if code in (ExitCode.STOPPED, ExitCode.PREEMPTED) and failure is None:
        _say(config, f"was stopped: its ranks ended with exit code {code} ({ExitCode(code).name})")
        return code
    if failure is not None:
        _say(config, f"failed on rank {failure.rank}: {failure.message.rstrip('.')}")
        return failure.exit_code
    if code - 128 in set(signal.Signals):
        _say(config, f"failed: a process was killed by {signal.Signals(code - 128).name}")
    elif code == 0:
        _say(config, "failed: its processes ended in order, but rank 0 left no summary")
    elif code in set(ExitCode):
        _say(config, f"failed with exit code {code} ({ExitCode(code).name}); the ranks' messages are above")
    else:
        _say(config, f"failed: its processes ended with exit code {code}")
    return code or 1


def shell_code(exit_code: int) -> int:
    """The code a shell shows. The launcher exits with the negated signal of a killed rank: 247 is SIGKILL."""
    signal_number = 256 - exit_code
    return 128 + signal_number if signal_number in set(signal.Signals) else exit_code


def check_tokens(config: RunConfig) -> None:
    """Raise ValueError when the corpus cannot be used. Encodes it into the cache, once for all ranks."""
    # Imported here: `mhc-dist --help` needs no numpy.
    from mhc_dist.data.token_files import check_vocabulary
    from mhc_dist.data.tokens import default_cache_folder, open_tokens

    check_vocabulary(open_tokens(config.data, default_cache_folder()), config.model.vocab_size)


def deepspeed_command(config: RunConfig, master_port: int, gpus: Sequence[str], trainer: str) -> list[str]:
    """The launcher's command line. Its own log lines stay out: the ranks and `report` tell failures."""
    where = (
        ["--include", f"localhost:{','.join(gpus)}"] if gpus else ["--num_gpus", str(config.num_processes)]
    )
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        # Without this a hostfile lying at the launcher's default place would send the run to other hosts.
        *("--hostfile", os.devnull),
        *where,
        *("--master_port", str(master_port)),
        *("--log_level", "critical"),
        *("--module", trainer),
        *("--config", str(config.folder / run_folder.CONFIG_FILE)),
    ]


def is_rank(command: Sequence[str], trainer: str) -> bool:
    """Whether a descendant is a rank: the launcher's own processes name the trainer, too, but later."""
    return list(command[1:4]) == ["-u", "-m", trainer]


def environment(num_processes: int, gpus: Sequence[str]) -> dict[str, str]:
    """This process's environment and what single-host runs need; what the user has set stays.

    Raises ValueError for variables with which ranks on GPUs would hang.
    """
    settings = dict(os.environ)
    settings.setdefault("OMP_NUM_THREADS", str(threads_per_process(num_processes)))
    # gloo asks the host name for an interface, which need not resolve; one host only talks to itself.
    if "lo" in (name for _, name in socket.if_nameindex()):
        settings.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # torch's stores answer a rank's death with stack traces; the ranks themselves say who died.
    settings.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The GPUs are named on the launcher's command line: a second opinion here would make it speak up.
    if gpus:
        settings.pop("CUDA_VISIBLE_DEVICES", None)
        settings |= cuda_settings(settings)
    else:
        settings |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return settings


def _say(config: RunConfig, what: str) -> None:
    print(f"mhc-dist: run {config.train.name} {what}.", file=sys.stderr, flush=True)
