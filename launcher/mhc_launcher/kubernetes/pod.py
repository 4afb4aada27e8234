"""The pod that every flavor starts: what it runs, sees, needs, may do, and how its health is asked."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_launcher.kubernetes.request import MASTER_PORT, USER, Manifest, Request

CONFIG_FOLDER = "/etc/mhc"


def train_arguments(request: Request, master: str) -> list[str]:
    """Arguments of the image's entry point: start this pod's processes; the others do the same."""
    return [
        *("train", f"{CONFIG_FOLDER}/config.yaml"),
        *("--hostfile", f"{CONFIG_FOLDER}/hostfile", "--no-ssh"),
        # A pod that is begun again goes on from the last checkpoint.
        *("--resume", "auto"),
        *("--master-addr", master, "--master-port", str(MASTER_PORT)),
    ]


def container(request: Request, arguments: Sequence[str], environment: Sequence[Manifest] = ()) -> Manifest:
    """The trainer's container. The exporter opens before the first step, so it can be asked early."""
    resources = {"cpu": str(request.cpus), "memory": request.memory}
    if request.gpus_per_node:
        resources["nvidia.com/gpu"] = str(request.gpus_per_node)
    resources |= {name: str(count) for name, count in request.devices.items()}
    capabilities: Manifest = {"drop": ["ALL"]}
    if request.devices:
        # A network card reads and writes memory by itself: pages that it knows must stay where they are.
        capabilities["add"] = ["IPC_LOCK"]
    made: Manifest = {
        "name": "trainer",
        "image": request.image,
        "args": list(arguments),
        "env": [
            {"name": "MHC_METRICS_PORT", "value": str(request.config.observe.metrics_port)},
            {"name": "HOME", "value": "/tmp"},
            *environment,
        ],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": capabilities,
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": mounts(),
    }
    if request.metrics_ports:
        made["ports"] = [
            {"name": f"metrics-{number}", "containerPort": port}
            for number, port in enumerate(request.metrics_ports)
        ]
        made |= probes(request)
    return made


def probes(request: Request) -> Manifest:
    """Start: the first rank exports. Life: its last step is not too long ago. Nobody asks for readiness."""
    ask = {"exec": {"command": ["mhc-healthcheck"]}}
    start_seconds = int(request.config.train.join_seconds) + 600
    return {
        "startupProbe": {
            "tcpSocket": {"port": "metrics-0"},
            "periodSeconds": 10,
            "failureThreshold": start_seconds // 10,
        },
        "livenessProbe": {**ask, "periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 4},
    }


def mounts() -> list[Manifest]:
    return [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "data", "mountPath": "/data", "readOnly": True},
        {"name": "runs", "mountPath": "/runs"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "scratch", "mountPath": "/tmp"},
    ]


def volumes(request: Request) -> list[Manifest]:
    return [
        {"name": "config", "configMap": {"name": request.name}},
        {"name": "data", "persistentVolumeClaim": {"claimName": request.data_claim, "readOnly": True}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": request.runs_claim}},
        # NCCL and gloo pass data between a pod's processes here; the default of 64 MB is too small for them.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": request.shared_memory}},
        {"name": "scratch", "emptyDir": {}},
    ]


def pod_spec(request: Request, containers: Sequence[Manifest]) -> Manifest:
    """Everything about the pod but who starts it."""
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": request.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": list(containers),
        "volumes": volumes(request),
    }
    if request.nodes > 1:
        # One pod a node: two on one would share its GPUs' links and its network.
        spec["affinity"] = {
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "labelSelector": {"matchLabels": request.labels},
                        "topologyKey": "kubernetes.io/hostname",
                    }
                ]
            }
        }
    if request.gpus_per_node:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return spec
