"""The survey for people: tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mhc_dist.preflight.findings import Report


def show(report: Report, found: list[str], console: Console) -> None:
    """Hosts, links, exchanges, then what is to be worried about."""
    hosts = Table(
        "rank", "host", "node", "device", "cores", "free memory", "free disk", "clock", "matmul fp32"
    )
    hosts.title = f"{len(report.facts)} ranks on {len(report.nodes)} nodes, {report.library}"
    for fact, skew, speed in zip(report.facts, report.skew_seconds, report.compute, strict=True):
        hosts.add_row(
            str(fact.rank),
            fact.host,
            str(list(report.nodes).index(fact.node)),
            fact.devices[0] if fact.devices else "CPU",
            str(fact.num_cpus),
            f"{fact.free_memory_bytes / 1e9:.1f} GB",
            f"{fact.free_disk_bytes / 1e9:.0f} GB",
            f"{skew * 1e3:+.1f} ms",
            f"{speed.fp32_flops / 1e9:.0f} GFLOP/s",
        )
    console.print(hosts)
    versions = ", ".join(f"{name} {value}" for name, value in report.facts[0].versions.items())
    console.print(f"versions on rank 0: {versions}", soft_wrap=True)
    if report.links:
        links = Table("ranks", "way", "latency", "bandwidth")
        for link in report.links:
            links.add_row(
                f"{link.first} - {link.second}",
                "inside a node" if report.inside(link) else "between nodes",
                f"{link.latency_seconds * 1e6:.0f} us",
                f"{link.bytes_per_second / 1e9:.2f} GB/s",
            )
        console.print(links)
        exchanges = Table("all-to-all, bytes a rank", "time", "sent a rank")
        for exchange in report.all_to_all:
            exchanges.add_row(
                f"{exchange.total_bytes:,}",
                f"{exchange.seconds * 1e3:.2f} ms",
                f"{exchange.bytes_per_second / 1e9:.3f} GB/s",
            )
        console.print(exchanges)
    for finding in found:
        console.print(f"warning: {finding}", style="yellow", soft_wrap=True, highlight=False)
    console.print(f"{len(found)} warnings, {report.seconds:.1f} s")
