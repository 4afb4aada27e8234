"""Dockerfile.cpu, really built and run without a Docker engine; Dockerfiles linted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import ROOT, SMALL, need, summary

IMAGE = "mhc-dist:cpu"
OWN_LAYERS_LIMIT_BYTES = 2_000_000_000


def cache() -> Path:
    return Path(os.environ.get("MHC_IMAGE_CACHE", Path.home() / ".cache" / "mhc-dist"))


def buildah(*arguments: str, timeout: float = 600) -> str:
    where = ["--root", str(cache() / "storage"), "--runroot", str(cache() / "run")]
    done = subprocess.run(
        ["buildah", *where, "--storage-driver", "vfs", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfiles_have_nothing_to_complain_about(name: str) -> None:
    """Oracle: hadolint, without exceptions but those that the file itself gives reasons for."""
    hadolint = str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run(
        [hadolint, str(ROOT / "docker" / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    need("buildah", "mmdebstrap")
    build = [str(ROOT / "docker" / "build_with_buildah.sh"), IMAGE]
    done = subprocess.run(build, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    name = buildah("from", IMAGE).strip()
    yield name
    buildah("rm", name)


@pytest.mark.needs_root
def test_image_trains_three_steps_as_an_ordinary_user(container: str, tmp_path: Path) -> None:
    """Oracle: the run's own summary, written by rank 0 inside the container."""
    overrides = [part for value in [*SMALL, "train.output=/runs"] for part in ("--set", value)]
    command = ["mhc-entrypoint", "train", "/opt/mhc/configs/tiny.yaml", *overrides]
    out = buildah(*("run", "--isolation", "chroot", "--env", "OMP_NUM_THREADS=1", container, "--"), *command)
    assert summary(out)["steps"] == 3
    user = buildah("run", "--isolation", "chroot", container, "--", "id", "-u").strip()
    assert user == "10001"


@pytest.mark.needs_root
def test_own_layers_stay_below_two_gigabytes(container: str) -> None:
    """Oracle: the sizes of the image's layers in its manifest, all but the first, which is the base's."""
    content = json.loads(buildah("inspect", "--type", "image", IMAGE))
    manifest = json.loads(content["Manifest"])
    own = [layer["size"] for layer in manifest["layers"][1:]]
    assert own
    print(f"own layers: {sum(own) / 1e9:.2f} GB")
    assert sum(own) < OWN_LAYERS_LIMIT_BYTES
    health = content["Docker"]["config"]["Healthcheck"]["Test"]
    assert health == ["CMD", "mhc-healthcheck"]
    assert content["Docker"]["config"]["User"] == "10001:10001"


@pytest.mark.needs_root
def test_sshd_of_the_image_needs_keys_and_no_root(container: str) -> None:
    """Oracle: the message of an entry point without keys."""
    where = ["--root", str(cache() / "storage"), "--runroot", str(cache() / "run"), "--storage-driver", "vfs"]
    done = subprocess.run(
        ["buildah", *where, "run", "--isolation", "chroot", container, "--", "mhc-entrypoint", "sshd"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "no authorized_keys" in done.stderr
