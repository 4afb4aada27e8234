"""Whether a process is there: real children, zombies, and reused numbers."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.liveness import _state_and_start, is_alive, this_process


def test_a_child_is_alive_until_it_is_killed_though_nobody_reaps_it() -> None:
    """Oracle: a killed child that was not waited for is a zombie: its number exists, the process does not."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    found = _state_and_start(child)
    assert found is not None
    name = replace(this_process(), pid=child, started=found[1])
    assert is_alive(name)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert _state_and_start(child) is not None
    assert not is_alive(name)
    os.waitpid(child, 0)
    assert _state_and_start(child) is None
    assert not is_alive(name)


def test_a_reused_number_is_another_process() -> None:
    """Oracle: same number, other start time."""
    me = this_process()
    assert is_alive(me)
    assert not is_alive(replace(me, started=me.started + 1))


def test_two_processes_of_one_container_share_a_pid_space() -> None:
    """Oracle: a fresh interpreter reports the same host and pid space, and another pid."""
    code = "from mhc_dist.guard.liveness import this_process as t; p = t(); print(p.host, p.pid, p.pid_space)"
    host, pid, space = subprocess.check_output([sys.executable, "-c", code], text=True).strip().split(" ", 2)
    me = this_process()
    assert (host, space) == (me.host, me.pid_space)
    assert int(pid) != me.pid


def test_exit_codes_collide_with_nobody_elses() -> None:
    """Oracle: shells use 0-2 and 126 up, sysexits.h 64-78; ours are apart from those and from each other."""
    codes = [code.value for code in ExitCode]
    assert len(set(codes)) == len(codes)
    assert all(code <= 2 or 78 < code < 126 for code in codes)
