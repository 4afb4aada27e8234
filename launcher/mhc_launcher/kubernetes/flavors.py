"""Who starts the pods: a plain Indexed Job, Kubeflow's TrainJob, or an MPIJob."""

from __future__ import annotations

from mhc_launcher.kubernetes.pod import container, pod_spec, train_arguments
from mhc_launcher.kubernetes.request import SSH_PORT, Flavor, Manifest, Request
from mhc_launcher.kubernetes.shared import config_map, network_policy, pod_monitor, service

MAX_RESTARTS = 10
"""Of all pods of a run. A crash that comes back every time ends the job after so many."""


def manifests(request: Request) -> list[Manifest]:
    """All manifests of a run, in the order in which they are to be applied."""
    match request.flavor:
        case Flavor.INDEXED_JOB:
            own, hosts = [_indexed_job(request)], [_pod_name(request, n) for n in range(request.nodes)]
        case Flavor.TRAINJOB:
            # Kubeflow's pods are called NAME-node-0-INDEX; the runtime's service has the job's name.
            own = [_training_runtime(request), _train_job(request)]
            hosts = [f"{request.name}-node-0-{n}.{request.name}" for n in range(request.nodes)]
        case Flavor.MPIJOB:
            own = [_mpi_job(request)]
            hosts = [f"{request.name}-worker-{n}.{request.name}" for n in range(request.nodes)]
    # The controllers of the other two make the service themselves.
    services = [service(request)] if request.flavor is Flavor.INDEXED_JOB else []
    monitors = [pod_monitor(request)] if request.metrics_ports else []
    return [config_map(request, hosts), *services, network_policy(request), *monitors, *own]


def _pod_name(request: Request, number: int) -> str:
    """The first label is the pod's host name in an Indexed Job, the second the headless service."""
    return f"{request.name}-{number}.{request.name}"


def _indexed_job(request: Request) -> Manifest:
    spec = pod_spec(request, [container(request, train_arguments(request, _pod_name(request, 0)))])
    spec["subdomain"] = request.name
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": request.metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": request.nodes,
            "parallelism": request.nodes,
            # A run lives and dies as a whole: one failed pod ends the job, and a new job resumes it.
            "backoffLimit": 0,
            # A pod that was evicted or whose node was drained is no failure, and is begun again. Where others
            # have ended for want of it, the job has failed: several pods take a new job, or a JobSet.
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    }
                ]
            },
            "template": {"metadata": {"labels": request.labels}, "spec": spec},
        },
    }


def _training_runtime(request: Request) -> Manifest:
    """What a TrainJob of this run looks like: an Indexed Job below a JobSet, without ssh."""
    master = f"{request.name}-node-0-0.{request.name}"
    made = container(request, train_arguments(request, master))
    made["name"] = "node"  # the container that Kubeflow fills in
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": request.metadata,
        "spec": {
            "mlPolicy": {"numNodes": request.nodes},
            "template": {
                "spec": {
                    "network": {"publishNotReadyAddresses": True},
                    # All pods anew, whichever failed or was evicted: they resume from the last checkpoint.
                    "failurePolicy": {"maxRestarts": MAX_RESTARTS},
                    "replicatedJobs": [
                        {
                            "name": "node",
                            "template": {
                                "metadata": {
                                    "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                                },
                                "spec": {
                                    "backoffLimit": 0,
                                    "template": {
                                        "metadata": {"labels": request.labels},
                                        "spec": pod_spec(request, [made]),
                                    },
                                },
                            },
                        }
                    ],
                }
            },
        },
    }


def _train_job(request: Request) -> Manifest:
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": request.metadata,
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": request.name,
            },
            "trainer": {"numNodes": request.nodes, "image": request.image},
        },
    }


def _mpi_job(request: Request) -> Manifest:
    """mpirun in a launcher pod starts the ranks over ssh in the workers; every process is a rank."""
    total = request.nodes * request.processes_per_node
    first = f"{request.name}-worker-0.{request.name}"
    ranks = ["mhc-dist", "train", "/etc/mhc/config.yaml", "--launcher", "none", "--resume", "auto"]
    exported = ("MASTER_ADDR", "MASTER_PORT", "PATH", "HOME")
    mpirun = [
        *("mpirun", "-n", str(total), "--hostfile", "/etc/mpi/hostfile", "--bind-to", "none"),
        *(part for name in exported for part in ("-x", name)),
    ]
    environment: list[Manifest] = [
        {"name": "MASTER_ADDR", "value": first},
        {"name": "MASTER_PORT", "value": "29500"},
        {"name": "MHC_SSH_KEYS", "value": "/etc/mhc-ssh"},
    ]
    launcher = container(request, ["mpi", *mpirun, *ranks], environment)
    for probe in ("startupProbe", "livenessProbe", "ports"):
        launcher.pop(probe, None)
    launcher["resources"] = {name: {"cpu": "1", "memory": "2Gi"} for name in ("requests", "limits")}
    worker = container(request, ["sshd"], environment)
    worker.setdefault("ports", []).append({"name": "ssh", "containerPort": SSH_PORT})
    worker["startupProbe"] = {"tcpSocket": {"port": "ssh"}, "periodSeconds": 5, "failureThreshold": 60}
    worker.pop("livenessProbe", None)  # between runs there is nobody to ask
    launcher_spec = pod_spec(request, [launcher])
    launcher_spec.pop("affinity", None)
    template_metadata = {"labels": request.labels}
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": request.metadata,
        "spec": {
            "slotsPerWorker": request.processes_per_node,
            "sshAuthMountPath": "/etc/mhc-ssh",
            "launcherCreationPolicy": "WaitForWorkersReady",
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 0},
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "Never",
                    "template": {"metadata": template_metadata, "spec": launcher_spec},
                },
                "Worker": {
                    "replicas": request.nodes,
                    "restartPolicy": "Never",
                    "template": {"metadata": template_metadata, "spec": pod_spec(request, [worker])},
                },
            },
        },
    }
