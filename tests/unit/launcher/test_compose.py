"""docker/compose.yaml fits the image and the files it mounts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]


def services() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    found: dict[str, Any] = content["services"]
    return found


def mounts(service: str) -> dict[str, str]:
    """Where in the container what is mounted: target to source."""
    parts = [entry.split(":") for entry in services()[service]["volumes"]]
    return {part[1]: part[0] for part in parts}


def test_everything_that_is_mounted_exists() -> None:
    """Oracle: the repository's files and the volumes of the same file."""
    volumes = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["volumes"]
    for name in services():
        for source in mounts(name).values():
            assert (ROOT / "docker" / source).exists() if source.startswith("..") else source in volumes, (
                source
            )


def test_prometheus_finds_rules_and_targets() -> None:
    """Oracle: its own config, whose paths are relative to where it is mounted."""
    config_file = PurePosixPath(services()["prometheus"]["command"][0].partition("=")[2])
    folder = mounts("prometheus")[str(config_file.parent)]
    config = yaml.safe_load((ROOT / "docker" / folder / config_file.name).read_text())
    for rules in config["rule_files"]:
        assert (ROOT / "docker" / folder / rules).exists()
    (pattern,) = config["scrape_configs"][0]["file_sd_configs"][0]["files"]
    watched = PurePosixPath(normpath(config_file.parent / pattern)).parent
    assert str(watched.parent) in mounts("prometheus")
    # The trainer writes to the same volume.
    assert mounts("prometheus")[str(watched.parent)] == mounts("trainer")["/runs"]


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    """Oracle: the provisioning files: the folder they name is mounted, the address is a service's."""
    provisioning = ROOT / "configs" / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "mhc.yaml").read_text())["providers"]
    dashboards = ROOT / "docker" / mounts("grafana")[provider["options"]["path"]]
    assert list(dashboards.glob("*.json"))
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services()


def test_images_leave_out_only_what_running_does_not_need() -> None:
    """Oracle: the lock's names, and the project's own dependencies, of which the CPU image lacks Triton."""
    pins = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    needed = {
        re.split(r"[<>=!~ ]", wanted)[0]
        for wanted in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    for image, allowed in (("cpu", {"triton"}), ("cuda", set[str]())):
        lines = (ROOT / "docker" / f"{image}_leaves_out.txt").read_text().splitlines()
        names = {line for line in lines if not line.startswith("#")}
        assert names <= pins, names - pins
        assert names & needed == allowed
