"""What CUDA and NCCL have to know before a process first touches its GPU. Imports no torch.

A rank keeps some twenty streams busy at once: compute and what runs beside it, a lane for each communicator,
and NCCL's own stream behind every lane. Most of them wait for a peer at any moment, and none may wait for
another one that it does not name.

CUDA reads its variables when it is first asked for anything, which libraries do while they are imported. So
they belong into a rank's environment before it starts: the launcher puts them there (`cuda_settings`), and a
rank makes sure (`check_cuda_settings`).
"""

from __future__ import annotations

from collections.abc import Mapping

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
MOST_CONNECTIONS = 32
DEFAULT_CONNECTIONS = 8

LOADING = "CUDA_MODULE_LOADING"
AT_ONCE = "EAGER"

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

BLOCKING = ("CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
"""Switches for debugging after which a receive that is posted early holds its process until it is over."""

VARIABLES = (CONNECTIONS, LOADING, *ALLOCATOR, *BLOCKING)


def cuda_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that a run on GPUs needs, as far as `environ` leaves them open.

    Streams share the queues of the device, eight by default: what waits at the head of one holds up streams
    that have nothing to do with it, and two ranks that hold each other up so never go on. Thirty-two is the
    most there can be.

    By default CUDA loads a kernel when it is first launched, for which it may have to wait for the whole
    device, and so for peers. Running everything once before the first step would not do: which kernel a
    library takes for the experts' matrices depends on how many rows arrive, in every step anew. So all are
    loaded at the start, which costs seconds and device memory for kernels that never run.

    Rows that arrive differ in number from microbatch to microbatch; segments that can grow keep the allocator
    from giving memory back in mid-step, for which it would wait for the device as well.

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
    loading = environ.get(LOADING)
    if loading is not None and loading != AT_ONCE:
        raise ValueError(
            f"{LOADING}={loading}: a kernel that is loaded in mid-step may wait for the whole device, on"
            " which others wait for peers, so ranks may wait for each other for ever. Unset it, or set it to"
            f" {AT_ONCE}."
        )
    settings = {} if given is not None else {CONNECTIONS: str(MOST_CONNECTIONS)}
    if loading is None:
        settings[LOADING] = AT_ONCE
    if not any(name in environ for name in ALLOCATOR):
        settings[ALLOCATOR[0]] = "expandable_segments:True"
    return settings


def check_cuda_settings(environ: Mapping[str, str]) -> None:
    """Raise ValueError unless a process that computes on a GPU was started with all it needs."""
    missing = cuda_settings(environ)
    if missing:
        listed = " ".join(f"{name}={value}" for name, value in missing.items())
        raise ValueError(
            f"{', '.join(missing)} must be set before a process on a GPU starts, or ranks may wait for each"
            f" other for ever. `mhc-dist train` does so; where something else starts the trainer, export"
            f" {listed}."
        )
