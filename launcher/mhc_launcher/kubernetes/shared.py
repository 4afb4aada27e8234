"""Manifests that all flavors have: config, service, network policy, metrics."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_dist.config import dump_config
from mhc_launcher.kubernetes.request import Manifest, Request


def config_map(request: Request, hosts: Sequence[str]) -> Manifest:
    """The resolved config, every value written out, and who the nodes are."""
    hostfile = "".join(f"{host} slots={request.processes_per_node}\n" for host in hosts)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": request.metadata,
        "immutable": True,
        "data": {"config.yaml": dump_config(request.pod_config), "hostfile": hostfile},
    }


def service(request: Request) -> Manifest:
    """Names for the pods. They are needed before a pod is ready: ranks meet first."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": request.metadata,
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": request.labels},
    }


def network_policy(request: Request) -> Manifest:
    """The run's pods talk to each other on any port: NCCL, gloo and MPI choose theirs. Prometheus may ask."""
    peers = [{"podSelector": {"matchLabels": request.labels}}]
    ingress: list[Manifest] = [{"from": peers}]
    if request.metrics_ports:
        ports = [{"protocol": "TCP", "port": port} for port in request.metrics_ports]
        monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
        ingress.append({"from": [{"namespaceSelector": monitoring}], "ports": ports})
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": request.metadata,
        "spec": {
            "podSelector": {"matchLabels": request.labels},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": [{"to": peers}, {"ports": dns}],
        },
    }


def pod_monitor(request: Request) -> Manifest:
    """For the Prometheus operator: one endpoint a rank; the run's name is a label of the target."""
    relabel = [{"targetLabel": "run", "replacement": request.config.train.name}]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": request.metadata,
        "spec": {
            "selector": {"matchLabels": request.labels},
            "namespaceSelector": {"matchNames": [request.namespace]},
            "podMetricsEndpoints": [
                {"port": f"metrics-{number}", "interval": "15s", "relabelings": relabel}
                for number in range(len(request.metrics_ports))
            ],
        },
    }
