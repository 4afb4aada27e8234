"""Checks that need a GPU: `python -m mhc_kernels.gpu_check [--output results/kernels]`.

Parity of every kernel with the fp64 reference on the device, launches in chunks included; bit-equality of
recompute and of two runs; streams of more than 2^31 elements; streams, devices and a host that never waits;
torch's operations that exist on GPUs only; and timings by `triton.testing.do_bench`.

Every check runs in a process of its own with a time limit: one that crashes the device, hangs or cannot be
compiled fails alone. The report, gpu_<device>.json, is written anew after each of them.

Exit status: 0 all passed, 1 something failed. Without a GPU it says so, loudly, and ends with status 0 having
checked nothing; with `--require` that is status 1. `--rehearse` runs the checks small and in Triton's
interpreter, which needs no GPU and proves nothing about one, but shows that they work. Its
report goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhc_kernels.gpu import experts, parity, running, timing
from mhc_kernels.gpu.plan import REHEARSAL, Check, Outcome, Plan
from mhc_kernels.launch.architecture import device_architecture
from mhc_kernels.provenance import provenance
from mhc_kernels.triton_backend import why_unavailable

TIME_LIMIT_SECONDS = 900.0
"""Of one check, compilation included."""
TOLD_CHARACTERS = 2000
"""How much of a crashed check's last words is kept."""


def checks(plan: Plan) -> dict[str, Check]:
    """Every check by name, in the order in which they run: what everything else rests on comes first."""
    named: dict[str, Check] = {}
    for dtype in plan.dtypes:
        label = str(dtype).removeprefix("torch.")
        for case in plan.cases:
            named[f"parity, {label}, {case.name}"] = partial(parity.parity, case, dtype)
        for case in plan.chunked_cases:
            named[f"parity in chunks, {label}, {case.name}"] = partial(parity.parity_in_chunks, case, dtype)
        named[f"token movement, {label}"] = partial(experts.token_movement, dtype)
    named |= {
        "values that are not finite": parity.not_finite,
        "no tokens": parity.no_tokens,
        "misaligned tensors": parity.misaligned,
        "more than 2^31 elements": parity.far_offsets,
        "grouped product": experts.grouped_product,
        "fp32 sums of bf16 products": experts.sums_in_fp32,
        "urgent stream": running.side_stream,
        "a host that never waits": running.host_never_waits,
        "another device": running.another_device,
        "torch.compile around a seam": running.compiled_around,
    }
    for channels in plan.timed_channels:
        named[f"times, C={channels}"] = partial(timing.seam_times, channels)
        named[f"times of token movement, C={channels}"] = partial(timing.token_times, channels)
    return named


def in_a_process(command: Sequence[str], limit_seconds: float) -> Outcome:
    """Run a command that writes an Outcome as JSON to the file whose path is put after it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        try:
            done = subprocess.run(
                [*command, str(path)], capture_output=True, text=True, check=False, timeout=limit_seconds
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, {}, f"did not end within {limit_seconds:.0f} s")
        if done.returncode or not path.exists():
            return Outcome(False, {}, f"status {done.returncode}: {done.stderr.strip()[-TOLD_CHARACTERS:]}")
        return Outcome(**json.loads(path.read_text()))


def run_all(names: Iterable[str], run: Callable[[str], Outcome], path: Path, about: dict[str, Any]) -> int:
    """Run the checks one by one, write the report after each, say what failed; the exit status."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        begin = time.perf_counter()
        outcome = run(name)
        seconds = round(time.perf_counter() - begin, 1)
        rows.append({"name": name, **outcome._asdict(), "seconds": seconds})
        path.write_text(json.dumps(about | {"checks": rows}, indent=2) + "\n")
        word = {True: "passed", False: "FAILED", None: "not run"}[outcome.passed]
        reason = "" if outcome.passed else f": {outcome.reason}"
        print(f"gpu-check: {word:8} {name}, {seconds} s{reason}", flush=True)
    failed = [row["name"] for row in rows if row["passed"] is False]
    passed = sum(row["passed"] is True for row in rows)
    print(f"gpu-check on {about['device']}: {passed} of {len(rows)} passed, {len(failed)} failed; in {path}")
    for name in failed:
        print(f"gpu-check: FAILED {name}", file=sys.stderr)
    return 1 if failed else 0


def about_the_device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(),
        "architecture": device_architecture(torch.device("cuda")),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "label": "measured on the device",
        "provenance": provenance("mhc_kernels.gpu_check"),
    }


def run_one(name: str, plan: Plan, path: Path) -> None:
    path.write_text(json.dumps(checks(plan)[name](plan)._asdict()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of the report, else results/kernels")
    parser.add_argument("--require", action="store_true", help="no GPU is an error")
    parser.add_argument(
        "--rehearse", action="store_true", help="small, in Triton's interpreter, without a GPU"
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="this check; may be repeated")
    parser.add_argument(
        "--outcome", type=Path, help="run the one check here and write what it says to this file"
    )
    arguments = parser.parse_args()
    plan = REHEARSAL if arguments.rehearse else Plan()
    names = arguments.only or list(checks(plan))
    unknown = [name for name in names if name not in checks(plan)]
    if unknown:
        parser.error(f"there is no check {unknown[0]!r}: use one of\n  " + "\n  ".join(checks(plan)))
    if arguments.outcome is not None:
        run_one(names[0], plan, arguments.outcome)
        return
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        about: dict[str, Any] = {"device": "no device", "label": "a rehearsal in Triton's interpreter"}
        output = arguments.output or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    elif not torch.cuda.is_available():
        print("gpu-check: SKIPPED, torch sees no GPU. NOTHING WAS CHECKED on a device.", file=sys.stderr)
        sys.exit(1 if arguments.require else 0)
    elif (reason := why_unavailable()) is not None:
        print(f"gpu-check: cannot check this device: {reason}", file=sys.stderr)
        sys.exit(1)
    else:
        about = about_the_device()
        output = arguments.output or Path("results/kernels")

    def run(name: str) -> Outcome:
        rehearsal = ["--rehearse"] if arguments.rehearse else []
        module = [sys.executable, "-m", "mhc_kernels.gpu_check", *rehearsal]
        return in_a_process([*module, "--only", name, "--outcome"], TIME_LIMIT_SECONDS)

    stem = about["device"].lower().replace(" ", "_").replace("/", "_")
    sys.exit(run_all(names, run, output / f"gpu_{stem}.json", about))


if __name__ == "__main__":
    main()
