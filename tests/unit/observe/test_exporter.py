"""The endpoint over real sockets."""

import socket
import threading
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge

from mhc_dist.observe.exporter import start_exporter


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        content: bytes = answer.read()
    return content.decode()


def make_registry(value: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("mhc_test", "A number", registry=registry).set(value)
    return registry


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_it_serves_the_registry_it_was_given_until_closed() -> None:
    """Oracle: the number set in the registry; after close the port can be bound again."""
    port = free_port()
    said: list[str] = []
    exporter = start_exporter(make_registry(42.0), port, address="127.0.0.1", announce=said.append)
    assert exporter.port == port
    assert "mhc_test 42.0" in fetch(port)
    exporter.close()
    assert said == []
    socket.create_server(("127.0.0.1", port)).close()


def test_a_taken_port_leads_to_the_next_in_stride_and_is_announced() -> None:
    """Oracle: a listener of our own on the first port; the second of the stride serves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said: list[str] = []
        exporter = start_exporter(
            make_registry(1.0), port, search=5, stride=2, address="127.0.0.1", announce=said.append
        )
        try:
            assert exporter.port > port
            assert (exporter.port - port) % 2 == 0
            assert said == [f"metrics port {port} is taken: serving on {exporter.port} instead"]
            assert "mhc_test 1.0" in fetch(exporter.port)
        finally:
            exporter.close()


def test_no_free_port_is_one_clear_error() -> None:
    """Oracle: the message has the range tried and both remedies."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"all 1 ports .*{port} to {port}.*free range, or to 0"):
            start_exporter(make_registry(1.0), port, search=1, address="127.0.0.1")


def test_impossible_ports_and_addresses_are_refused() -> None:
    """Oracle: each message names the number or address and what to set."""
    with pytest.raises(ValueError, match=r"port 70000, which is not within 1 to 65535"):
        start_exporter(make_registry(1.0), 70000)
    with pytest.raises(ValueError, match=r"cannot serve metrics on 192\.0\.2\.1"):
        start_exporter(make_registry(1.0), 9400, address="192.0.2.1")


def test_it_answers_while_the_main_thread_hangs() -> None:
    """Oracle: another thread fetches while this one waits for a lock, as in a stuck collective."""
    exporter = start_exporter(make_registry(7.0), free_port(), address="127.0.0.1")
    answers: list[str] = []
    held = threading.Lock()
    held.acquire()

    def ask() -> None:
        answers.append(fetch(exporter.port))
        held.release()

    threading.Thread(target=ask, daemon=True).start()
    assert held.acquire(timeout=10)
    assert "mhc_test 7.0" in answers[0]
    exporter.close()
