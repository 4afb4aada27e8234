"""What in a survey is a reason to worry, each with what to do about it. Pure functions of the report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mhc_dist.preflight.facts import Facts
from mhc_dist.preflight.measure import AllToAll, Compute, PairLink

MOST_SKEW_SECONDS = 1.0
LEAST_FREE_MEMORY = 0.2
LEAST_FREE_DISK_BYTES = 20 << 30
LEAST_SHARED_MEMORY_BYTES = 1 << 30
SLOW_FACTOR = 2.0
"""A link or a device this many times slower than the median of its kind slows the whole run down."""


@dataclass(frozen=True)
class Report:
    """Everything a preflight found; lists go by rank."""

    library: str
    facts: list[Facts]
    skew_seconds: list[float]
    links: list[PairLink]
    all_to_all: list[AllToAll]
    compute: list[Compute]
    seconds: float

    @property
    def nodes(self) -> dict[str, list[Facts]]:
        """Ranks by node, in the order of the first rank of each."""
        found: dict[str, list[Facts]] = {}
        for fact in self.facts:
            found.setdefault(fact.node, []).append(fact)
        return found

    def inside(self, link: PairLink) -> bool:
        """Whether a link stays inside a node."""
        return self.facts[link.first].node == self.facts[link.second].node


def findings(report: Report) -> list[str]:
    """One sentence per problem; none means that nothing speaks against a run."""
    checks = (_versions, _clocks, _room, _nodes, _links, _devices)
    return [finding for check in checks for finding in check(report)]


def _versions(report: Report) -> Iterator[str]:
    for name in report.facts[0].versions:
        values = [fact.versions.get(name, "unknown") for fact in report.facts]
        ((common, _),) = Counter(values).most_common(1)
        others = [fact for fact, value in zip(report.facts, values, strict=True) if value != common]
        if others:
            listed = ", ".join(f"rank {fact.rank} ({fact.host}) {fact.versions.get(name)}" for fact in others)
            yield f"{name} differs: most have {common}, but {listed}. Install the same version on all nodes."


def _clocks(report: Report) -> Iterator[str]:
    for fact, skew in zip(report.facts, report.skew_seconds, strict=True):
        if abs(skew) > MOST_SKEW_SECONDS:
            yield (
                f"the clock of rank {fact.rank} ({fact.host}) is {skew:+.1f} s off rank 0's: metrics and"
                " logs of the nodes will not line up. Synchronise the clocks (chrony, systemd-timesyncd)."
            )


def _room(report: Report) -> Iterator[str]:
    for ranks in report.nodes.values():
        fact = ranks[0]
        if fact.free_memory_bytes < LEAST_FREE_MEMORY * fact.memory_bytes:
            yield (
                f"{fact.host} has {fact.free_memory_bytes / 1e9:.1f} of {fact.memory_bytes / 1e9:.1f} GB of"
                " memory left. End what else runs there."
            )
        if fact.free_disk_bytes < LEAST_FREE_DISK_BYTES:
            yield (
                f"{fact.host} has {fact.free_disk_bytes / 1e9:.1f} GB left where {fact.folder} is. Free some,"
                " or set train.output to another disk: checkpoints go there."
            )
        if fact.shared_memory_bytes < LEAST_SHARED_MEMORY_BYTES:
            yield (
                f"/dev/shm of {fact.host} has {fact.shared_memory_bytes / 1e6:.0f} MB. Containers start with"
                " 64 MB: give them more (docker run --shm-size, an emptyDir of medium Memory)."
            )
        if not fact.can_write:
            yield f"{fact.host} cannot write to {fact.folder}. Change its rights, or set train.output."


def _nodes(report: Report) -> Iterator[str]:
    counts = {ranks[0].host: len(ranks) for ranks in report.nodes.values()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{host} {count}" for host, count in counts.items())
        yield (
            f"nodes have different numbers of ranks ({listed}): expert groups will cross nodes. Start the"
            " same number on each."
        )
    for ranks in report.nodes.values():
        fact = ranks[0]
        if not fact.devices and fact.num_cpus < len(ranks):
            yield (
                f"{fact.host} has {fact.num_cpus} cores for {len(ranks)} ranks: they wait for each other."
                " Start fewer there."
            )


def _links(report: Report) -> Iterator[str]:
    for inside in (True, False):
        links = [link for link in report.links if report.inside(link) is inside]
        if len(links) < 3:
            continue
        usual = statistics.median(link.bytes_per_second for link in links)
        for link in links:
            if link.bytes_per_second * SLOW_FACTOR < usual:
                first, second = report.facts[link.first], report.facts[link.second]
                yield (
                    f"the link between rank {link.first} ({first.host}) and rank {link.second}"
                    f" ({second.host}) carries {link.bytes_per_second / 1e9:.2f} GB/s, others of its kind"
                    f" {usual / 1e9:.2f}. Look at its cable, port and interface (--interface), or leave the"
                    " node out."
                )


def _devices(report: Report) -> Iterator[str]:
    usual = statistics.median(found.fp32_flops for found in report.compute)
    for fact, found in zip(report.facts, report.compute, strict=True):
        if found.fp32_flops * SLOW_FACTOR < usual:
            yield (
                f"rank {fact.rank} ({fact.host}) computes {found.fp32_flops / 1e9:.0f} GFLOP/s, others"
                f" {usual / 1e9:.0f}. Look for other programs, throttling or a wrong power limit there."
            )
