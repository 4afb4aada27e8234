"""Manifests and batch scripts: complete, valid, and equal to the committed examples."""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from mhc_launcher.cli import main

ROOT = Path(__file__).parents[3]
SCHEMAS = Path(__file__).parent / "schemas"
EXAMPLES = sorted((ROOT / "configs" / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "configs" / "slurm").glob("*.sbatch"))
VERSION = "1.34"
CORE_KINDS = {"ConfigMap", "Service", "NetworkPolicy", "Job"}


def rendered(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    assert end.value.code in (0, None), captured.err
    return captured.out


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", EXAMPLES + SCRIPTS, ids=lambda path: path.name)
def test_committed_examples_are_what_the_command_writes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the committed file, made by the command in its first comment."""
    text = path.read_text()
    command = next(line for line in text.splitlines() if line.startswith("# mhc-dist "))
    assert rendered(shlex.split(command[2:]), monkeypatch, capsys) == text


def test_there_is_an_example_of_every_kind() -> None:
    """Oracle: the three flavors, by the kind that starts their pods."""
    kinds = {document["kind"] for path in EXAMPLES for document in documents(path)}
    assert {"Job", "TrainJob", "TrainingRuntime", "MPIJob", "PodMonitor"} <= kinds
    assert len(SCRIPTS) >= 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_manifest_is_valid(path: Path) -> None:
    """Oracle: the schemas of Kubernetes, strictly, and of the custom resources, with no unknown field."""
    for document in documents(path):
        if document["kind"] in CORE_KINDS:
            kubernetes_validate.validate(document, VERSION, strict=True)
            continue
        schema = json.loads((SCHEMAS / f"{document['kind']}.json").read_text())
        jsonschema.validate(document, schema)
        for kind, part in core_parts(document, schema):
            kubernetes_validate.validate(as_job(kind, part), VERSION, strict=True)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("Job", lambda d: d["spec"]["template"]["spec"]["containers"][0].update(imag="x")),
        ("PodMonitor", lambda d: d["spec"]["podMetricsEndpoints"][0].update(interval="soon")),
        ("TrainJob", lambda d: d["spec"].update(runtime={})),
        ("MPIJob", lambda d: d["spec"].pop("mpiReplicaSpecs")),
    ],
)
def test_the_validators_see_mistakes(kind: str, spoil: Any) -> None:
    """Oracle: a valid manifest with one mistake in it."""
    found = next(doc for path in EXAMPLES for doc in documents(path) if doc["kind"] == kind)
    spoiled = copy.deepcopy(found)
    spoil(spoiled)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_outside(spoiled)


def check_outside(document: dict[str, Any]) -> None:
    """The document against the schema of its own kind."""
    if document["kind"] in CORE_KINDS:
        kubernetes_validate.validate(document, VERSION, strict=True)
    else:
        schema = json.loads((SCHEMAS / f"{document['kind']}.json").read_text())
        jsonschema.validate(document, schema)


def core_parts(value: Any, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parts of a custom resource whose types are Kubernetes' own."""
    if "core" in schema:
        yield schema["core"], value
    elif isinstance(value, dict):
        others = schema.get("additionalProperties")
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name, others if isinstance(others, dict) else {})
            yield from core_parts(part, inner)
    elif isinstance(value, list):
        for part in value:
            yield from core_parts(part, schema.get("items", {}))


def as_job(kind: str, part: Any) -> dict[str, Any]:
    spec = part if kind == "JobSpec" else {"template": part}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "checked"}, "spec": spec}


def pod_specs(path: Path) -> Iterator[dict[str, Any]]:
    """Every pod specification in a file, wherever it stands."""

    def search(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if "containers" in value and "volumes" in value:
                yield value
            for part in value.values():
                yield from search(part)
        elif isinstance(value, list):
            for part in value:
                yield from search(part)

    yield from search(documents(path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_pods_have_what_a_run_needs_and_no_rights(path: Path) -> None:
    """Oracle: the list of what a manifest must not lack, here."""
    specs = list(pod_specs(path))
    assert specs
    for spec in specs:
        names = {volume["name"]: volume for volume in spec["volumes"]}
        assert {"data", "runs", "config", "shared-memory"} <= set(names)
        assert names["shared-memory"]["emptyDir"]["medium"] == "Memory"
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert not spec["automountServiceAccountToken"]
        # The last checkpoint after SIGTERM: what the config allows for it, and more.
        assert spec["terminationGracePeriodSeconds"] > 60
        for container in spec["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert any("startupProbe" in container for spec in specs for container in spec["containers"])
    kinds = {document["kind"] for document in documents(path)}
    assert {"ConfigMap", "NetworkPolicy", "PodMonitor"} <= kinds


@pytest.mark.parametrize("flavor", ["indexed-job", "kubeflow-trainjob", "mpijob"])
def test_pods_get_the_network_cards_that_are_named(
    flavor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what Kubernetes' device plugins ask for: a limit by name, and the right to lock memory."""
    command = ["mhc-dist", "k8s", "render", "configs/paper_3b.yaml", "--nodes", "2", "--gpus-per-node", "8"]
    options = ["--flavor", flavor, "--resource", "rdma/ib=8", "--set", "data.corpus=/data"]
    path = tmp_path / "run.yaml"
    path.write_text(rendered([*command, *options], monkeypatch, capsys))
    test_every_manifest_is_valid(path)
    trainers = [
        container
        for spec in pod_specs(path)
        for container in spec["containers"]
        if "nvidia.com/gpu" in container["resources"]["limits"]
    ]
    assert trainers
    for container in trainers:
        assert container["resources"]["limits"]["rdma/ib"] == "8"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_pods_of_an_indexed_job_find_each_other() -> None:
    """Oracle: Kubernetes' naming: JOB-INDEX is the host name, the subdomain is the headless service."""
    (path,) = [path for path in EXAMPLES if any(doc["kind"] == "Job" for doc in documents(path))]
    found = {document["kind"]: document for document in documents(path)}
    job, service, config = found["Job"], found["Service"], found["ConfigMap"]
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    hosts = [line.split()[0] for line in config["data"]["hostfile"].splitlines()]
    assert hosts == [f"{name}-{index}.{subdomain}" for index in range(job["spec"]["completions"])]
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--master-addr") + 1] == hosts[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "3", "--gpus-per-node", "1"], ["make 3", "needs 4", "--nodes"]),
        (["--nodes", "2", "--gpus-per-node", "0"], ["--processes-per-node"]),
        (["--nodes", "2", "--gpus-per-node", "2", "--processes-per-node", "4"], ["GPU of its own"]),
        (["--nodes", "2", "--gpus-per-node", "2", "--resource", "rdma=8"], ["DOMAIN/NAME=COUNT"]),
        (["--nodes", "2", "--gpus-per-node", "2", "--resource", "rdma/ib=0"], ["DOMAIN/NAME=COUNT"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    options: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the words that name the mistake and its remedy."""
    monkeypatch.setattr(sys, "argv", ["mhc-dist", "k8s", "render", str(ROOT / "configs/tiny.yaml"), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error
