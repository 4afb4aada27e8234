#!/usr/bin/env bash
# What the cluster tests need beyond this project's environment, on Debian, as root. Elsewhere the tests that lack
# something say so and are skipped.
set -euo pipefail

packages=()
need() { # PROGRAM PACKAGE
    PATH="${PATH}:/usr/sbin:/sbin" command -v "$1" > /dev/null || packages+=("$2")
}
need ip iproute2
need ssh openssh-client
need sshd openssh-server
need pdsh pdsh
need buildah buildah
need mmdebstrap mmdebstrap
need munged munge
need slurmd slurmd
need slurmctld slurmctld
need srun slurm-client

if [ ${#packages[@]} -eq 0 ]; then exit 0; fi
if ! command -v apt-get > /dev/null; then
    echo "cluster tests: no apt-get here, so tests that need ${packages[*]} WILL BE SKIPPED" >&2
    exit 0
fi
echo "cluster tests: installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null
