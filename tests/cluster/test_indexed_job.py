"""The contract of a Kubernetes Indexed Job: the container's command, in the environment that pods get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_runs import ENVIRON, MHC_DIST, ROOT, SMALL, need, summary
from hosts import Hosts

from mhc_dist.config import load_config

pytestmark = pytest.mark.needs_root


def render(hosts: Hosts, output: Path) -> dict[str, Any]:
    """The manifests of the small run on two pods, by kind."""
    # The run's folder is a volume in the pods; here it is a folder that both hosts see.
    overrides = [part for value in SMALL for part in ("--set", value)]
    shape = ["--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "2", "--flavor", "indexed-job"]
    done = hosts[0].run([MHC_DIST, "k8s", "render", str(ROOT / "configs/tiny.yaml"), *shape, *overrides])
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def test_pods_train_as_the_manifest_says(tmp_path: Path) -> None:
    """Oracle: rank 0's summary; host names, arguments and variables as Kubernetes would make them."""
    need("ip", "unshare")
    # What the headless service resolves: POD.SERVICE.
    with Hosts(2, ["tiny-0.tiny", "tiny-1.tiny"]) as hosts:
        found = render(hosts, tmp_path)
        config_map, template = found["ConfigMap"]["data"], found["Job"]["spec"]["template"]["spec"]
        assert [template["subdomain"], found["Service"]["metadata"]["name"]] == ["tiny", "tiny"]
        (container,) = template["containers"]
        folder = tmp_path / "etc"
        folder.mkdir()
        for name, text in config_map.items():
            (folder / name).write_text(text)
        assert str(load_config(folder / "config.yaml").train.output) == "/runs"
        arguments = [part.replace("/etc/mhc", str(folder)) for part in container["args"]]
        environ = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"] != "HOME"}
        started = []
        for index in range(found["Job"]["spec"]["completions"]):
            # The volume for runs, in a mount namespace of the pod's own.
            (tmp_path / "runs").mkdir(exist_ok=True)
            mounted = f'mkdir -p /runs && mount --bind {tmp_path / "runs"} /runs && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mounted, "sh", MHC_DIST, *arguments]
            pod = ENVIRON | environ | {"JOB_COMPLETION_INDEX": str(index)}
            started.append(hosts[index].start(command, pod))
        answers = [process.communicate(timeout=600) for process in started]
        assert [process.returncode for process in started] == [0, 0], answers
        assert summary(answers[0][0])["steps"] == 3
        assert (tmp_path / "runs" / "tiny" / "summary.json").exists()
