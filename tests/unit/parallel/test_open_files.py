"""How many files a rank may have open."""

from __future__ import annotations

import resource
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist

from mhc_dist.parallel.open_files import OWN_FILES, allow_open_files, files_needed


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def group_of(size: int) -> list[dist.ProcessGroupGloo]:
    """All members of a gloo group, in this process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    members: dict[int, dist.ProcessGroupGloo] = {}

    def join(rank: int) -> None:
        members[rank] = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))

    threads = [Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [members[rank] for rank in range(size)]


def test_a_member_of_a_gloo_group_opens_a_file_for_every_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's list of open files. What grows with the group is one file a rank and group."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    before = open_files()
    small = group_of(4)
    between = open_files()
    large = group_of(12)
    after = open_files()
    a_rank_small, a_rank_large = (between - before) / len(small), (after - between) / len(large)
    assert a_rank_large - a_rank_small == pytest.approx(12 - 4, abs=1.0)
    assert files_needed(512, hosts_store=False) == OWN_FILES + 3 * 512


@pytest.mark.parametrize(
    ("now", "most", "want"),
    [
        (1024, 4096, (3328, 4096)),
        (1024, resource.RLIM_INFINITY, (3328, resource.RLIM_INFINITY)),
        (20000, 20000, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_a_limit_is_raised_as_far_as_needed(
    now: int, most: int, want: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand, for the rank that hosts the store of 512: 256 + 6 * 512 files."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (now, most))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    allow_open_files(512, hosts_store=True)
    assert asked == ([] if want is None else [want])


def test_a_host_that_allows_too_few_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: both numbers and the remedy."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    with pytest.raises(ValueError, match=r"1024 ranks has up to 6400 files open.* allows 4096.*ulimit -Hn"):
        allow_open_files(1024, hosts_store=True)
