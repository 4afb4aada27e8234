"""Manifests that start a run on a Kubernetes cluster, as plain data."""
