"""Train on several nodes: their processes are started from here, node by node, or by somebody else.

    --hostfile F [--launcher pdsh]      from here over ssh, by DeepSpeed's launcher
    --hostfile F --launcher openmpi     from here by mpirun
    --launcher slurm                    from inside an allocation by srun
    --hostfile F --no-ssh ...           only this node's processes: the same command runs on every node
    --launcher none                     this process is one rank already

The summary that rank 0 writes decides about success; a launcher's exit code is only the last resort.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhc_dist.config import RunConfig, dump_config
from mhc_dist.guard.last_words import REPORTED
from mhc_dist.parallel.cuda_settings import VARIABLES, check_cuda_settings, cuda_settings
from mhc_dist.plan.run_programs import plan_run
from mhc_launcher import marked, mpi, run_folder, slurm, survey
from mhc_launcher.attempts import run_attempts
from mhc_launcher.bootstrap import DEFAULT_PORT
from mhc_launcher.children import STOP_MARGIN_SECONDS, Ended, run_group
from mhc_launcher.devices import gpus_for_run
from mhc_launcher.forwarded import user_variables, write_variables
from mhc_launcher.hostfile import Host, check_slots, read_hostfile, write_hostfile
from mhc_launcher.interfaces import GLOO, NCCL, check_interface, network_settings
from mhc_launcher.local import TRAINER, check_tokens, environment, report, tell_end
from mhc_launcher.ports import check_metrics_ports, is_free
from mhc_launcher.probe import NodeReport, Question, look
from mhc_launcher.rank import become_rank
from mhc_launcher.ssh import ARGUMENTS, check_installed, client_arguments, run_on, run_on_all
from mhc_launcher.start_options import Launcher, StartOptions
from mhc_launcher.tools import check_tool, with_own_tools

END_SECONDS = 30.0
"""For ending what is left on a node; an unreachable one costs the time ssh takes to give up."""


@dataclass(frozen=True)
class Nodes:
    """Where a run will be, after every node has been looked at."""

    hosts: tuple[Host, ...]
    over_ssh: bool
    master_addr: str
    master_port: int
    on_gpus: bool
    variables: dict[str, str]
    """What processes on the nodes get beyond what their node gives them."""


def train_on_nodes(config: RunConfig, options: StartOptions, trainer: str = TRAINER) -> int:
    """Run `config` to its end and return the exit code; `options` have been checked.

    Raises ValueError for what cannot be run. On success the last line of stdout is the run's summary (with
    --no-ssh, on node 0).
    """
    if options.no_ssh:
        return _train_this_node(config, options, trainer)
    if options.launcher is Launcher.NONE:
        return become_rank(config, trainer, options.resume)
    return _train_from_here(config, options, trainer)


# ---- from here ------------------------------------------------------------------------------------------


def _train_from_here(config: RunConfig, options: StartOptions, trainer: str) -> int:
    hosts, source = _hosts(options)
    sizes = config.parallel
    check_slots(hosts, config.num_processes, sizes.pipeline, sizes.data, source)
    _check_names(hosts)
    assert options.launcher is not None
    over_ssh = options.launcher is Launcher.PDSH or (
        options.launcher is Launcher.OPENMPI and not all(mpi.is_this_host(host.name) for host in hosts)
    )
    for tool in _tools(options.launcher):
        check_tool(tool)
    if over_ssh:
        check_installed()
    with run_folder.reserved(config):
        plan_run(config)
        check_tokens(config)
        mark = uuid.uuid4().hex
        nodes = _look_at_nodes(config, options, tuple(hosts), over_ssh, mark)
        if moved := run_folder.prepare(config, options.resume):
            print(f"An earlier run is kept in {moved}.", flush=True)
        files = _write_files(config, options, nodes, mark)
        summary = config.folder / run_folder.SUMMARY_FILE

        def ask_elsewhere(number: signal.Signals) -> bool:
            return _ask_elsewhere(options, nodes, mark, trainer, number)

        def start(arguments: list[str]) -> Ended:
            ended = run_group(
                [*_command(config, options, nodes, files, trainer), *arguments],
                _launcher_environment(options, nodes, files),
                lambda command: _takes_stop(options.launcher, command, trainer),
                ask_elsewhere=ask_elsewhere if over_ssh else None,
                # A complete run ends by itself; a failed one may wait for a node that is gone.
                is_over=lambda: run_folder.read_failure(config.folder) is not None,
                stop_seconds=config.checkpoint.stop_seconds + STOP_MARGIN_SECONDS,
            )
            if over_ssh and not summary.exists():
                _end_leftovers(options, nodes, mark)
            return ended

        return run_attempts(config, options.restarts, start, lambda ended: report(config, ended))


def _hosts(options: StartOptions) -> tuple[list[Host], str]:
    if options.launcher is Launcher.SLURM:
        return slurm.allocated_hosts(os.environ), "this Slurm allocation"
    assert options.hostfile is not None
    return read_hostfile(options.hostfile), f"--hostfile {options.hostfile}"


def _check_names(hosts: Sequence[Host]) -> None:
    for host in hosts:
        if len(hosts) > 1 and (host.name == "localhost" or host.name.startswith("127.")):
            raise ValueError(
                f"host {host.name} stands beside others: on each of them this name means the node itself."
                " Write the name or address by which the other nodes know it."
            )


def _tools(launcher: Launcher) -> tuple[str, ...]:
    return {Launcher.PDSH: ("pdsh",), Launcher.OPENMPI: ("mpirun", "ompi_info")}.get(
        launcher, ("srun", "sinfo")
    )


def _look_at_nodes(
    config: RunConfig, options: StartOptions, hosts: tuple[Host, ...], over_ssh: bool, mark: str
) -> Nodes:
    """Ask every node what it has; decide where ranks meet and what they compute on."""
    master_addr = options.master_addr or hosts[0].name
    witness = config.train.output.resolve() / f".{config.train.name}.{mark}"
    first_port = config.observe.metrics_port
    most_slots = max(host.slots for host in hosts)
    question = Question(
        master_addr=master_addr,
        several_hosts=len(hosts) > 1,
        interface=options.interface,
        master_port=options.master_port,
        metrics_ports=tuple(range(first_port, first_port + most_slots)) if first_port else (),
        witness=str(witness),
    )
    # The first host alone must have the port free; asking all of them would refuse other nodes' servers.
    witness.touch()
    try:
        if over_ssh:
            reports = survey.survey(hosts, question, options.ssh_port)
        else:
            reports = [look(question)] * len(hosts)
            survey.check_report(hosts[0].name, reports[0], question) if len(hosts) == 1 else None
    finally:
        witness.unlink()
    if options.launcher is Launcher.SLURM:
        port = options.master_port or slurm.master_port(os.environ)
        on_gpus = slurm.computes_on_gpus(os.environ, config.train.backend, hosts)
    else:
        port = survey.check_first_host(hosts[0].name, reports[0], options.master_port)
        on_gpus = survey.computes_on_gpus(hosts, reports, config.train.backend)
    variables = _variables(options, hosts, reports, on_gpus, master_addr, port, mark)
    return Nodes(hosts, over_ssh, master_addr, port, on_gpus, variables)


def _variables(
    options: StartOptions,
    hosts: Sequence[Host],
    reports: Sequence[NodeReport],
    on_gpus: bool,
    master_addr: str,
    master_port: int,
    mark: str,
) -> dict[str, str]:
    """The environment of all ranks, in rising order of who has the last word: us, the user's files, us."""
    threads = min(max(1, report.num_cpus // host.slots) for host, report in zip(hosts, reports, strict=True))
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    variables["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    if options.interface:
        variables |= {GLOO: options.interface, NCCL: options.interface}
    elif GLOO in os.environ:
        variables[GLOO] = os.environ[GLOO]
    elif len(hosts) == 1:
        variables[GLOO] = "lo"
    variables |= user_variables(os.environ, Path.home(), Path.cwd())
    variables |= {
        # Launchers that build on MPI or srun forward neither.
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        marked.VARIABLE: mark,
        REPORTED: "1",
        # srun and mpirun may run the trainer as a file: its folder must not hide packages of other names.
        "PYTHONSAFEPATH": "1",
    }
    if on_gpus:
        # What was set here goes along: a node's own shell may say something else.
        given = {name: os.environ[name] for name in VARIABLES if name in os.environ} | variables
        variables = given | cuda_settings(given)
    else:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return variables


@dataclass(frozen=True)
class _Files:
    hostfile: Path
    variables: Path


def _write_files(config: RunConfig, options: StartOptions, nodes: Nodes, mark: str) -> _Files:
    """What DeepSpeed's launcher reads, kept in the run's folder: how was this run started?"""
    folder = config.folder.resolve() / "launch"
    folder.mkdir(exist_ok=True)
    files = _Files(folder / "hostfile", folder / "environment")
    write_hostfile(files.hostfile, nodes.hosts)
    write_variables(files.variables, nodes.variables, commas=options.launcher is not Launcher.SLURM)
    return files


def _command(
    config: RunConfig, options: StartOptions, nodes: Nodes, files: _Files, trainer: str
) -> list[str]:
    arguments = options.split_launcher_args
    match options.launcher:
        case Launcher.OPENMPI:
            arguments = mpi.arguments(nodes.variables.get(GLOO), arguments)
            what = ["--module", trainer]
        case Launcher.SLURM:
            # DeepSpeed hands srun a file, whatever it was given.
            arguments = slurm.arguments(nodes.hosts, arguments)
            what = [_file_of(trainer)]
        case _:
            what = ["--module", trainer]
    launcher_args = ["--launcher_args", " ".join(arguments)] if arguments else []
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(files.hostfile)),
        *("--launcher", str(options.launcher)),
        # One host is started in the same way as many; the hosts have been asked already.
        *("--force_multi", "--no_ssh_check"),
        *("--master_addr", nodes.master_addr),
        *("--master_port", str(nodes.master_port)),
        *("--log_level", "critical"),
        *launcher_args,
        *what,
        *("--config", str((config.folder / run_folder.CONFIG_FILE).resolve())),
    ]


def _file_of(trainer: str) -> str:
    from importlib.util import find_spec

    spec = find_spec(trainer)
    assert spec is not None, trainer
    assert spec.origin is not None, trainer
    return spec.origin


def _launcher_environment(options: StartOptions, nodes: Nodes, files: _Files) -> dict[str, str]:
    settings = with_own_tools(dict(os.environ)) | {"DS_ENV_FILE": str(files.variables)}
    # pdsh adds the user's and host's name itself.
    joined = " ".join(client_arguments(os.environ, options.ssh_port))
    settings |= {ARGUMENTS: joined, "PDSH_RCMD_TYPE": "ssh", "PRTE_MCA_plm_ssh_args": joined}
    if nodes.on_gpus:
        settings.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        settings |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return settings


def _takes_stop(launcher: Launcher | None, command: Sequence[str], trainer: str) -> bool:
    """Whether a process below us is to be told to stop: a rank, or srun, which tells its tasks."""
    if launcher is Launcher.SLURM:
        return bool(command) and Path(command[0]).name == "srun"
    return marked.is_rank(command, trainer)


def _ask_elsewhere(
    options: StartOptions, nodes: Nodes, mark: str, trainer: str, number: signal.Signals
) -> bool:
    """Ask the ranks of one node to stop; they tell the others. False if no node has any yet."""
    command = [sys.executable, "-m", "mhc_launcher.marked", mark, "stop", trainer, number.name]
    for host in nodes.hosts:
        answer = run_on(host.name, command, END_SECONDS, options.ssh_port)
        if answer.exit_code == 0 and answer.out.strip() not in ("", "0"):
            return True
    return False


def _end_leftovers(options: StartOptions, nodes: Nodes, mark: str) -> None:
    """A launcher that is ended leaves its processes on other nodes running: look there, and end them."""
    command = [sys.executable, "-m", "mhc_launcher.marked", mark, "end"]
    answers = run_on_all([host.name for host in nodes.hosts], command, END_SECONDS, options.ssh_port)
    for answer in answers:
        if answer.exit_code:
            print(
                f"mhc-dist: host {answer.host} cannot be asked for what is left of the run there:"
                f" {answer.last_error}. When it is back: {' '.join(command)}",
                file=sys.stderr,
                flush=True,
            )


# ---- this node alone ------------------------------------------------------------------------------------


def _train_this_node(config: RunConfig, options: StartOptions, trainer: str) -> int:
    """Start the processes of this node; the same command runs on the others, with their node ranks."""
    assert options.hostfile is not None
    assert options.node_rank is not None
    assert options.master_addr is not None
    hosts = read_hostfile(options.hostfile)
    sizes = config.parallel
    check_slots(hosts, config.num_processes, sizes.pipeline, sizes.data, f"--hostfile {options.hostfile}")
    if not 0 <= options.node_rank < len(hosts):
        raise ValueError(
            f"--node-rank {options.node_rank} is outside 0..{len(hosts) - 1}, the lines of"
            f" {options.hostfile}. Count the nodes from 0."
        )
    slots = hosts[options.node_rank].slots
    port = options.master_port or DEFAULT_PORT
    if options.node_rank == 0 and not is_free(port):
        raise ValueError(
            f"port {port} is in use on this host, where the ranks are to meet. Give all nodes another"
            " --master-port."
        )
    plan_run(config)
    check_tokens(config)
    check_metrics_ports(config.observe.metrics_port, slots)
    gpus = gpus_for_run(config.train.backend, slots)
    settings = environment(slots, gpus) | user_variables(os.environ, Path.home(), Path.cwd())
    if gpus:
        check_cuda_settings(settings)  # with what the user's files add
    if options.interface is not None:
        check_interface(options.interface, "--interface", loopback_is_meant=len(hosts) == 1)
        settings |= {GLOO: options.interface, NCCL: options.interface}
    elif len(hosts) > 1:
        # The setting for one host is loopback; here it must lead to the others.
        settings.pop(GLOO, None)
        asked = {name: os.environ[name] for name in (GLOO, NCCL) if name in os.environ}
        settings |= asked | network_settings(asked, options.master_addr, several_hosts=True)
    chosen = replace(options, master_port=port)
    stop_seconds = config.checkpoint.stop_seconds + STOP_MARGIN_SECONDS
    if options.node_rank == 0:
        with run_folder.reserved(config):
            if moved := run_folder.prepare(config, options.resume):
                print(f"An earlier run is kept in {moved}.", flush=True)

            def start_first(arguments: list[str]) -> Ended:
                command = _node_command(chosen, hosts, gpus, config.folder / run_folder.CONFIG_FILE, trainer)
                return run_group(
                    [*command, *arguments],
                    settings | {REPORTED: "1"},
                    lambda command: marked.is_rank(command, trainer),
                    stop_seconds=stop_seconds,
                )

            return run_attempts(config, options.restarts, start_first, lambda ended: report(config, ended))
    with tempfile.TemporaryDirectory(prefix="mhc-dist-") as folder:
        path = Path(folder) / run_folder.CONFIG_FILE
        path.write_text(dump_config(config))

        def start(arguments: list[str]) -> Ended:
            return run_group(
                [*_node_command(chosen, hosts, gpus, path, trainer), *arguments],
                settings,
                lambda command: marked.is_rank(command, trainer),
                stop_seconds=stop_seconds,
            )

        def told(ended: Ended) -> int:
            in_order = ended.exit_code == 0 and ended.stopped_by is None
            return 0 if in_order else tell_end(config, ended)

        return run_attempts(config, options.restarts, start, told)


def _node_command(
    options: StartOptions, hosts: Sequence[Host], gpus: Sequence[str], config_file: Path, trainer: str
) -> list[str]:
    # A hostfile of our own beside the config: DeepSpeed's reader knows no comment behind a host.
    hostfile = config_file.with_name("hostfile")
    write_hostfile(hostfile, hosts)
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(hostfile)),
        *("--no_ssh", "--node_rank", str(options.node_rank)),
        *("--master_addr", str(options.master_addr)),
        *("--master_port", str(options.master_port)),
        *("--log_level", "critical"),
        *("--module", trainer),
        *("--config", str(config_file)),
    ]
