#!/bin/sh
# What some tests need of Debian: sh tests/debian.sh FOLDER-OF-PYTHON programs|prometheus. Where it cannot be had they are skipped,
# and say what for; exit code 1 says so here.
set -eu
bin=$1
wanted=$2

have() {
    for tool; do
        command -v "$tool" >/dev/null || return 1
    done
}

have apt-get dpkg || exit 0

case $wanted in
programs)
    [ "$(id -u)" = 0 ] && ! have wrk chromium buildah mmdebstrap runc strace || exit 0
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends wrk chromium buildah mmdebstrap runc strace >/dev/null; } || {
        echo "wrk, chromium, buildah, mmdebstrap, runc and strace cannot be installed; the tests that need them are skipped"
        exit 1
    }
    ;;
prometheus)
    # Unpacked beside Python: installed, it would be a daemon of this machine.
    ! have prometheus promtool && ! [ -x "$bin/promtool" ] || exit 0
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    [ "$(id -u)" != 0 ] || apt-get update -qq || true    # a fresh machine knows of no package yet
    {
        (cd "$folder" && apt-get download -qq prometheus 2>/dev/null)
        # Newer releases of Debian have it in a package of its own.
        (cd "$folder" && apt-get download -qq promtool 2>/dev/null) || true
        for package in "$folder"/*.deb; do
            dpkg -x "$package" "$folder"
        done
        cp "$folder/usr/bin/prometheus" "$folder/usr/bin/promtool" "$bin"
    } || {
        echo "prometheus cannot be unpacked; the tests that need it are skipped"
        exit 1
    }
    ;;
*)
    echo "$0: nothing of Debian is called $wanted; there are programs and prometheus"
    exit 64
    ;;
esac
