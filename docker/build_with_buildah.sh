#!/usr/bin/env bash
# Build docker/Dockerfile.cpu without a Docker engine, on Debian, as root:
#
#   docker/build_with_buildah.sh IMAGE [BUILD ARGUMENTS OF buildah ...]
#
# Needs buildah and mmdebstrap (apt-get install buildah mmdebstrap). The base image is made from Debian's archive
# by mmdebstrap, once: it is kept in MHC_IMAGE_CACHE (default: ~/.cache/mhc-dist), like pip's downloads. Images
# lie in MHC_IMAGE_CACHE/storage. The settings of this machine's pip and apt are used, none of them stays in the
# image.
set -euo pipefail
cd "$(dirname "$0")/.."

image="${1:?name the image: docker/build_with_buildah.sh mhc-dist:cpu}"
shift
cache="${MHC_IMAGE_CACHE:-${HOME}/.cache/mhc-dist}"
base=localhost/mhc-debian-base:bookworm
mkdir -p "${cache}/pip"

for tool in buildah mmdebstrap; do
    command -v "${tool}" > /dev/null || {
        echo "build_with_buildah: ${tool} is missing. On Debian: apt-get install buildah mmdebstrap" >&2
        exit 2
    }
done

build() { # chroot and vfs need no kernel module and no privilege beyond root's
    buildah --root "${cache}/storage" --runroot "${cache}/run" --storage-driver vfs "$@"
}

if ! build inspect --type image "${base}" > /dev/null 2>&1; then
    archive="${cache}/bookworm.tar"
    [ -s "${archive}" ] || {
        mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "${archive}.part"
        mv "${archive}.part" "${archive}"
    }
    container=$(build from scratch)
    build add "${container}" "${archive}" /
    build commit --rm --quiet "${container}" "${base}"
fi

settings=(--build-arg "BASE_IMAGE=${base}" --build-arg PIP_NO_CACHE_DIR=0)
# What pip and apt need here, shown to the build and kept out of the image.
settings+=(--volume "${cache}/pip:/var/cache/pip" --volume /etc/apt/apt.conf.d:/etc/apt/apt.conf.d:ro)
settings+=(--volume /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro)
if [ -s /etc/pip.conf ]; then settings+=(--secret "id=pip,src=/etc/pip.conf"); fi
# Wheels that pip would take from folders of this machine.
for folder in ${PIP_FIND_LINKS:-}; do
    [ -d "${folder}" ] && settings+=(--volume "${folder}:/wheels:ro" --build-arg WHEELS=/wheels)
done

# The format of Docker: the other one knows no health check.
build build --isolation chroot --format docker --quiet "${settings[@]}" "$@" \
    --file docker/Dockerfile.cpu --tag "${image}" .
