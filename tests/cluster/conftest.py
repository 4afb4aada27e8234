from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# The helpers beside the tests, whose import mode knows no packages.
sys.path.insert(0, str(Path(__file__).parent))

# A run starts in ten seconds on two idle cores, in a minute on busy ones; an image is built in two or in ten.
LIMIT_SECONDS = {"test_image.py": 2400}
OTHERS_LIMIT_SECONDS = 900


def pytest_configure(config: pytest.Config) -> None:
    # A run that is asked to stop still removes its hosts, as after Ctrl-C.
    if config.option.markexpr == "cluster":
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.cluster)
        item.add_marker(pytest.mark.timeout(LIMIT_SECONDS.get(item.path.name, OTHERS_LIMIT_SECONDS)))
        if os.geteuid() != 0 and "needs_root" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="network namespaces and sshd on port 22 need root"))
