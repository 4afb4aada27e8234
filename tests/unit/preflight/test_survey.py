from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from mhc_dist.plan.cluster import load_cluster
from mhc_dist.preflight.cluster_file import cluster, cluster_text
from mhc_dist.preflight.facts import Facts
from mhc_dist.preflight.findings import Report, findings
from mhc_dist.preflight.measure import AllToAll, Compute, PairLink, rounds_of_pairs


def facts(rank: int) -> Facts:
    return Facts(
        rank=rank,
        node=f"node {rank // 2}",
        host=f"host{rank // 2}",
        pid=100 + rank,
        num_cpus=8,
        devices=(),
        memory_bytes=64 * 10**9,
        free_memory_bytes=60 * 10**9,
        shared_memory_bytes=32 * 10**9,
        folder="runs",
        free_disk_bytes=10**12,
        can_write=True,
        versions={"python": "3.11.9", "code": "abc"},
    )


@pytest.fixture
def healthy() -> Report:
    links = [
        PairLink(a, b, *((1e-6, 8e9) if a // 2 == b // 2 else (3e-5, 1e9)))
        for a, b in combinations(range(4), 2)
    ]
    speed = Compute(fp32_flops=5e10, bf16_flops=2e10, copy_bytes_per_second=1e10)
    exchange = AllToAll(1 << 20, 1e-3, 1e9)
    found = [facts(rank) for rank in range(4)]
    return Report("Open MPI", found, [0.0] * 4, links, [exchange], [speed] * 4, 3.0)


@pytest.mark.parametrize("size", range(1, 10))
def test_rounds_meet_every_pair_once(size: int) -> None:
    """Oracle: all combinations of two; nobody twice in a round, and as few rounds as there can be."""
    rounds = list(rounds_of_pairs(size))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(size), 2))
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(rounds) <= size


def test_a_healthy_cluster_gives_no_warning(healthy: Report) -> None:
    """Oracle: a report made healthy by hand."""
    assert findings(healthy) == []


@pytest.mark.parametrize(
    ("rank", "change", "words"),
    [
        (1, {"versions": {"python": "3.12.1", "code": "abc"}}, ["python differs", "rank 1 (host0) 3.12.1"]),
        (3, {"versions": {"python": "3.11.9", "code": "xyz"}}, ["code differs", "rank 3 (host1) xyz"]),
        (2, {"free_memory_bytes": 10**9}, ["host1 has 1.0 of 64.0 GB", "End what else runs"]),
        (0, {"free_disk_bytes": 10**9}, ["host0 has 1.0 GB left", "train.output"]),
        (0, {"shared_memory_bytes": 64 * 10**6}, ["/dev/shm of host0 has 64 MB", "--shm-size"]),
        (2, {"can_write": False}, ["host1 cannot write to runs", "train.output"]),
        (2, {"num_cpus": 1}, ["host1 has 1 cores for 2 ranks"]),
    ],
)
def test_each_trouble_is_told_with_its_remedy(
    healthy: Report, rank: int, change: dict[str, object], words: list[str]
) -> None:
    """Oracle: one fact spoilt by hand, and the words that name it."""
    spoilt = list(healthy.facts)
    spoilt[rank] = replace(spoilt[rank], **change)  # type: ignore[arg-type]
    (found,) = findings(replace(healthy, facts=spoilt))
    assert [word for word in words if word not in found] == [], found


def test_a_slow_link_a_slow_rank_and_a_wrong_clock_are_told(healthy: Report) -> None:
    """Oracle: one link at a tenth, one rank at a third, one clock five seconds ahead."""
    slow = (0, 3)
    links = [
        replace(link, bytes_per_second=1e8) if (link.first, link.second) == slow else link
        for link in healthy.links
    ]
    speeds = [*healthy.compute[:3], replace(healthy.compute[3], fp32_flops=1.5e10)]
    report = replace(healthy, links=links, compute=speeds, skew_seconds=[0.0, 5.0, 0.0, 0.0])
    found = findings(report)
    assert len(found) == 3
    assert "the clock of rank 1 (host0) is +5.0 s off" in found[0]
    assert "between rank 0 (host0) and rank 3 (host1) carries 0.10 GB/s" in found[1]
    assert "rank 3 (host1) computes 15 GFLOP/s, others 50" in found[2]


def test_the_cluster_file_is_what_the_planner_reads(healthy: Report, tmp_path: Path) -> None:
    """Oracle: the medians of the report, read back by the planner's own loader."""
    path = tmp_path / "found.yaml"
    path.write_text(cluster_text(cluster(healthy, "found")))
    read = load_cluster(str(path))
    assert (read.devices_per_node, read.num_nodes) == (2, 2)
    assert read.node_link.bytes_per_second.value == 8e9
    assert read.network_link.latency_seconds.value == 3e-5
    assert read.network_link.bytes_per_second.source.startswith("measured")
    alone = replace(healthy, facts=[facts(0)], links=[], compute=healthy.compute[:1], skew_seconds=[0.0])
    assert "assumption" in cluster(alone, "alone").network_link.bytes_per_second.source
