"""Ask every host of a run about itself over ssh, before anything is started there.

What would show up minutes later as a hang, or as one of a thousand stack traces, is one sentence here.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from mhc_launcher.code_hash import code_hash
from mhc_launcher.hostfile import Host
from mhc_launcher.probe import NodeReport, Question
from mhc_launcher.ssh import Answer, run_on_all

PROBE_SECONDS = 60.0

Ask = Callable[[Sequence[str], Sequence[str]], list[Answer]]
"""Runs a command on all hosts: (names, command) -> answers in the order of the names."""


def survey(hosts: Sequence[Host], question: Question, ssh_port: int | None) -> list[NodeReport]:
    """One report per host. Raises ValueError, naming the host and the remedy, if any cannot take part."""
    command = [sys.executable, "-m", "mhc_launcher.probe", json.dumps(asdict(question))]
    answers = run_on_all([host.name for host in hosts], command, PROBE_SECONDS, ssh_port)
    reports = [_report(answer) for answer in answers]
    for host, report in zip(hosts, reports, strict=True):
        check_report(host.name, report, question)
    return reports


def _report(answer: Answer) -> NodeReport:
    if answer.exit_code == 255:
        raise ValueError(
            f"host {answer.host} cannot be reached over ssh: {answer.last_error}. Is it on, is its name"
            f" right, and may you log in without a password (`ssh {answer.host} true`)? Correct the hostfile"
            " or the keys, or start every node by itself: --no-ssh --node-rank R --master-addr A."
        )
    try:
        fields = json.loads(answer.out.splitlines()[-1]) if answer.exit_code == 0 else None
    except (ValueError, IndexError):
        fields = None
    if fields is None:
        raise ValueError(
            f"host {answer.host} cannot run {sys.executable} -m mhc_launcher.probe (exit code"
            f" {answer.exit_code}): {answer.last_error}. Install the same environment at the same path on"
            " every node, or put it on a file system that all nodes share; start the run from a folder that"
            " all of them have."
        )
    fields["taken_metrics_ports"] = tuple(fields["taken_metrics_ports"])
    return NodeReport(**fields)


def check_report(name: str, report: NodeReport, question: Question) -> None:
    """Raise ValueError when this node cannot take part in the run."""
    here = {"Python": platform.python_version(), "code": code_hash()}
    for what, mine, its in (("Python", here["Python"], report.python), ("code", here["code"], report.code)):
        if mine != its:
            raise ValueError(
                f"host {name} has different {what}: {its} there, {mine} here. Bring all nodes to the same"
                " version, or put the environment on a file system that all nodes share."
            )
    if report.network_problem is not None:
        raise ValueError(report.network_problem)
    if not report.sees_runs:
        raise ValueError(
            f"host {name} does not see {question.witness}, which was written a moment ago: the run's folder"
            " has to lie on a file system that all nodes share. Set train.output to such a folder, or start"
            " every node by itself: --no-ssh --node-rank R --master-addr A."
        )
    if report.taken_metrics_ports:
        ports = ", ".join(map(str, report.taken_metrics_ports))
        raise ValueError(
            f"port {ports} is in use on host {name}, and ranks export their metrics there. Set"
            " observe.metrics_port to another port, or to 0 for no exporter."
        )


def check_first_host(name: str, report: NodeReport, master_port: int | None) -> int:
    """The port on which ranks meet. Raises ValueError when the chosen one is taken on the first host."""
    if master_port is None:
        return report.free_port
    if not report.master_port_is_free:
        raise ValueError(
            f"--master-port {master_port} is in use on host {name}, where the ranks are to meet. Choose"
            " another one, or leave it out and a free one is found."
        )
    return master_port


def computes_on_gpus(hosts: Sequence[Host], reports: Sequence[NodeReport], backend: str) -> bool:
    """Whether this run computes on GPUs, the same on all hosts.

    Raises ValueError when a host has fewer GPUs than slots while the run wants them.
    """
    counts: Mapping[str, int] = {
        host.name: report.num_gpus for host, report in zip(hosts, reports, strict=True)
    }
    if backend == "gloo" or (backend == "auto" and not any(counts.values())):
        return False
    for host in hosts:
        if counts[host.name] < host.slots:
            raise ValueError(
                f"train.backend={backend}: host {host.name} has {counts[host.name]} GPUs for {host.slots}"
                " slots, and every process needs one of its own. Correct the slots, or set train.backend=gloo"
                " to compute on CPUs."
            )
    return True
