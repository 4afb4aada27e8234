"""Through which network interface ranks talk. gloo and NCCL guess, and the guess is often wrong.

gloo takes the address that the host name resolves to; on Debian that is 127.0.1.1, which no other node can
reach: the run hangs. So the interface that leads to the master's address is chosen here, and one that the
user has named is checked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"


def addresses() -> dict[str, list[str]]:
    """IPv4 and IPv6 addresses of this host's interfaces, by name; interfaces without any are left out."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
        if any(entry.family in families for entry in entries)
    }


def interface_to(master_addr: str) -> str:
    """Name of the interface whose address this host would use towards `master_addr`.

    Raises ValueError when the name does not resolve or no interface leads there.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise ValueError(
            f"host {socket.gethostname()} cannot resolve the master address {master_addr!r}:"
            f" {error.strerror}. Give an address that every node can resolve (--master-addr, MASTER_ADDR)."
        ) from None
    # Connecting a datagram socket sends nothing: the kernel only looks the route up.
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError as error:
            raise ValueError(
                f"host {socket.gethostname()} has no route to the master address {master_addr}:"
                f" {error.strerror}. Its interfaces: {_listed()}. Give an address that every node can reach"
                " (--master-addr, MASTER_ADDR)."
            ) from None
        own = probe.getsockname()[0]
    # An address of this host itself is reached through lo, whichever interface holds it.
    for name, found in addresses().items():
        if own in found:
            return name
    raise ValueError(
        f"host {socket.gethostname()} would reach {master_addr} from {own}, an address of none of its"
        f" interfaces: {_listed()}. Name one with --interface or {GLOO}."
    )


def network_settings(environ: Mapping[str, str], master_addr: str, several_hosts: bool) -> dict[str, str]:
    """Variables to add so that this host's ranks can talk to the others.

    Raises ValueError when the interface that the user has named, or the one that was found, cannot work.
    """
    if not several_hosts:
        return {}
    chosen = [name.strip() for name in environ.get(GLOO, "").split(",") if name.strip()]
    if chosen:
        # Several "hosts" on one machine, to try things out: said twice, it is meant.
        for name in chosen:
            check_interface(name, GLOO, loopback_is_meant=_is_loopback(master_addr))
        return {}
    found = interface_to(master_addr)
    check_interface(found, f"the way to master address {master_addr}", loopback_is_meant=False)
    return {GLOO: found} if NCCL in environ else {GLOO: found, NCCL: found}


def check_interface(name: str, source: str, *, loopback_is_meant: bool) -> None:
    """Raise ValueError unless this host has the interface and other hosts could reach it."""
    found = addresses()
    if name not in found:
        raise ValueError(
            f"{source} names interface {name!r}, which host {socket.gethostname()} does not have. It has"
            f" {_listed()}. Name one that leads to the other nodes with --interface, or unset {source}."
        )
    if all(_is_loopback(address) for address in found[name]) and not loopback_is_meant:
        raise ValueError(
            f"{source} leads through interface {name!r} of host {socket.gethostname()}, which other nodes"
            f" cannot reach. It has {_listed()}. Name one that leads to the others with --interface, and a"
            " master address that is not this host's loopback."
        )


def _is_loopback(name_or_address: str) -> bool:
    try:
        return ipaddress.ip_address(name_or_address).is_loopback
    except ValueError:
        return name_or_address == "localhost"


def _listed() -> str:
    return ", ".join(f"{name} ({' '.join(found)})" for name, found in sorted(addresses().items()))
