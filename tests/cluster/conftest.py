from __future__ import annotations

import os
import signal
import subprocess
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


def single_node_run(output: Path, overrides: tuple[str, ...] = ()) -> str:
    """What the small run prints, started on this machine alone."""
    from cluster_runs import ENVIRON, train_command

    done = subprocess.run(
        train_command(output, overrides=overrides),
        env=os.environ | ENVIRON,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What the small run's last step gives on a single node."""
    from cluster_runs import summary

    found = summary(single_node_run(tmp_path_factory.mktemp("single")))["train_loss"]
    assert isinstance(found, float)
    return found


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """All steps of a run that saves, on a single node, and that nobody kills."""
    from cluster_runs import SAVING, losses

    output = tmp_path_factory.mktemp("uninterrupted")
    single_node_run(output, SAVING)
    return losses(output)
