"""TCP ports on this host: find a free one, or say who cannot have the one that was asked for."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` on every interface."""
    with socket.socket() as listener:
        # Connections that ended a minute ago must not count as a server.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def check_master_port(port: int) -> None:
    """Raise ValueError when the processes could not meet on `port`."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--master-port {port} is no port. Choose one from 1024 to 65535, or leave it out.")
    if not is_free(port):
        raise ValueError(
            f"--master-port {port} is in use on this host. Choose another one, or leave it out and a"
            " free one is found."
        )


def check_metrics_ports(first_port: int, num_processes: int) -> None:
    """Raise ValueError when an exporter of this host's processes would find its port taken; 0 is none."""
    if first_port == 0:
        return
    taken = [port for port in range(first_port, first_port + num_processes) if not is_free(port)]
    if taken:
        raise ValueError(
            f"observe.metrics_port={first_port}: {num_processes} processes export on {first_port} to"
            f" {first_port + num_processes - 1}, but {', '.join(map(str, taken))} is in use on this host. Set"
            " observe.metrics_port to another port, or to 0 for no exporter."
        )
