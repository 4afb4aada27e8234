"""The HTTP endpoint of one rank, on its own thread: it answers while training hangs.

`/metrics` for Prometheus, `/status` (JSON) for `mhc-dist top`.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

LARGEST_PORT = 65535
STATUS_PATH = "/status"

Status = Mapping[str, str | int | float | None]
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class Exporter:
    """A running endpoint. `port` is the one it got, which need not be the one asked for."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _with_status(metrics: Application, status: Callable[[], Status]) -> Application:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != STATUS_PATH:
            return metrics(environ, start_response)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(status()).encode()]

    return application


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def start_exporter(
    registry: CollectorRegistry,
    port: int,
    *,
    search: int = 10,
    stride: int = 1,
    address: str = "0.0.0.0",
    announce: Callable[[str], None] = _to_stderr,
    status: Callable[[], Status] | None = None,
) -> Exporter:
    """Serve `registry` on `port`, or if that is taken on the next free of `search` ports, which is announced.

    Args:
        port: 1 to 65535. The caller leaves the exporter out when observe.metrics_port is 0.
        search: how many ports to try in all.
        stride: distance between the ports tried. With the number of local ranks, and ports base + local
            rank, no rank takes the port that another is entitled to.
        address: what to bind to; all interfaces by default, since Prometheus asks from outside.
        status: what `/status` answers, called on the endpoint's thread.

    Raises ValueError when none of the ports can be had.
    """
    assert search >= 1, search
    assert stride >= 1, stride
    if not 1 <= port <= LARGEST_PORT:
        raise ValueError(
            f"observe.metrics_port leads to port {port}, which is not within 1 to {LARGEST_PORT}. Lower it."
        )
    candidates = [number for number in range(port, port + search * stride, stride) if number <= LARGEST_PORT]
    for candidate in candidates:
        try:
            server, thread = start_http_server(candidate, addr=address, registry=registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ValueError(
                f"cannot serve metrics on {address}:{candidate}: {error.strerror or error}. Set"
                " observe.metrics_port to a port this user may open (above 1023), or to 0 for no metrics."
            ) from error
        if status is not None:
            server.set_app(_with_status(make_wsgi_app(registry), status))
        if candidate != port:
            announce(f"metrics port {port} is taken: serving on {candidate} instead")
        return Exporter(candidate, server, thread)
    raise ValueError(
        f"all {len(candidates)} ports tried for metrics are taken ({candidates[0]} to {candidates[-1]}, every"
        f" {stride}). Set observe.metrics_port to a free range, or to 0 for no metrics."
    )
