#!/bin/sh
# Pins the Dockerfile's base image to the digest that its tag has today: sh k8s/pin_base.sh. It asks the image's registry by skopeo.
set -eu
image=$(sed -n 's/^ARG BASE=\([^@]*\).*/\1/p' Dockerfile)
command -v skopeo >/dev/null || {
    echo "skopeo is not installed; Debian, Fedora and Homebrew have it" >&2
    exit 69
}
digest=$(skopeo inspect --no-tags --format '{{.Digest}}' "docker://docker.io/library/$image")
echo "$digest" | grep -Eqx 'sha256:[0-9a-f]{64}' || {
    echo "skopeo gives no digest of $image but '$digest'; the Dockerfile is left as it is" >&2
    exit 69
}
sed -i "s/^ARG BASE=.*/ARG BASE=$image@$digest/" Dockerfile
echo "The Dockerfile builds on $image@$digest"
