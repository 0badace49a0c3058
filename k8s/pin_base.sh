#!/bin/sh
# Pins the base image of the Dockerfile to the current digest of its tag: sh k8s/pin_base.sh. skopeo reads the digest from the registry.
set -eu
image=$(sed -n 's/^ARG BASE=\([^@]*\).*/\1/p' Dockerfile)
command -v skopeo >/dev/null || {
    echo "skopeo is not installed; install it with apt, dnf or brew" >&2
    exit 69
}
digest=$(skopeo inspect --no-tags --format '{{.Digest}}' "docker://docker.io/library/$image")
echo "$digest" | grep -Eqx 'sha256:[0-9a-f]{64}' || {
    echo "skopeo returned '$digest' for $image, which is not a digest; the Dockerfile is unchanged" >&2
    exit 69
}
sed -i "s/^ARG BASE=.*/ARG BASE=$image@$digest/" Dockerfile
echo "The Dockerfile now uses $image@$digest"
