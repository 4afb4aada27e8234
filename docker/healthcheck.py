#!/usr/bin/python3
"""Healthy: this container's first rank answers, and its last step is not too long ago. Standard library only.

MHC_METRICS_PORT    observe.metrics_port of the run (9400); 0: the run exports nothing, so nothing is asked
MHC_HEALTH_SECONDS  longest time since the last step (900): more than a step and a checkpoint together take
"""

from __future__ import annotations

import os
import re
import sys
import time
import urllib.request

TIMESTAMP = re.compile(r"^mhc_last_step_timestamp_seconds(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def main() -> int:
    port = int(os.environ.get("MHC_METRICS_PORT", "9400"))
    if port == 0:
        return 0
    limit_seconds = float(os.environ.get("MHC_HEALTH_SECONDS", "900"))
    url = f"http://127.0.0.1:{port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            text = answer.read().decode()
    except OSError as error:
        print(f"{url} does not answer: {error}. Is observe.metrics_port={port} in the run's config?")
        return 1
    found = TIMESTAMP.search(text)
    if found is None:
        print(f"{url} answers, but not as a rank of mhc_dist. Set MHC_METRICS_PORT to the run's port.")
        return 1
    age_seconds = time.time() - float(found[1])
    if age_seconds > limit_seconds:
        print(f"the last step ended {age_seconds:.0f} s ago, {limit_seconds:.0f} s are allowed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
