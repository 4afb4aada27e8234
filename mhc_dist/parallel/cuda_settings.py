"""What CUDA and NCCL have to know before a process first touches its GPU. Imports no torch.

A rank keeps some twenty streams busy at once: compute and what runs beside it, a lane for each communicator,
and NCCL's own stream behind every lane. Most of them wait for a peer at any moment, and none may wait for
another one that it does not name.
"""

from __future__ import annotations

from collections.abc import Mapping

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
MOST_CONNECTIONS = 32
DEFAULT_CONNECTIONS = 8

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

BLOCKING = ("CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
"""Switches for debugging after which a receive that is posted early holds its process until it is over."""


def cuda_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that a run on GPUs sets for itself, as far as `environ` leaves them open.

    Streams share the queues of the device, eight by default: what waits at the head of one holds up streams
    that have nothing to do with it, and two ranks that hold each other up so never go on. Thirty-two is the
    most there can be. Rows that arrive differ in number from microbatch to microbatch; segments that can grow
    keep the allocator from giving memory back in mid-step, for which it would wait for the whole device and
    so for peers.

    Raises ValueError for variables with which a run would hang.
    """
    for name in BLOCKING:
        if environ.get(name, "0") not in ("", "0"):
            raise ValueError(
                f"{name}={environ[name]}: a receive is posted before its message is sent, and with this it"
                " holds its rank until then, so ranks would wait for each other for ever. Unset it; what each"
                " rank waits for is told after train.timeout_seconds."
            )
    given = environ.get(CONNECTIONS)
    if given is not None and (not given.isdigit() or int(given) < DEFAULT_CONNECTIONS):
        raise ValueError(
            f"{CONNECTIONS}={given}: streams that wait for other ranks would share so few queues that ranks"
            f" may wait for each other for ever. Unset it, or set it to {MOST_CONNECTIONS}."
        )
    settings = {} if given is not None else {CONNECTIONS: str(MOST_CONNECTIONS)}
    if not any(name in environ for name in ALLOCATOR):
        settings[ALLOCATOR[0]] = "expandable_segments:True"
    return settings
