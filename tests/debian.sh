#!/bin/sh
# Installs Debian's programs that some tests need: sh tests/debian.sh FOLDER-OF-PYTHON programs|prometheus. Ends with 1 where they cannot be
# installed; the tests that need them are skipped then, with a reason.
set -eu
bin=$1
set=$2

have() {
    for tool; do
        command -v "$tool" >/dev/null || return 1
    done
}

have apt-get dpkg || exit 0

case $set in
programs)
    [ "$(id -u)" = 0 ] && ! have wrk chromium buildah mmdebstrap runc strace || exit 0
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends wrk chromium buildah mmdebstrap runc strace >/dev/null; } || {
        echo "wrk, chromium, buildah, mmdebstrap, runc and strace cannot be installed; the tests that need them are skipped"
        exit 1
    }
    ;;
prometheus)
    # It is unpacked next to Python; installed as a package, it would start a daemon.
    ! have prometheus promtool && ! [ -x "$bin/promtool" ] || exit 0
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    [ "$(id -u)" != 0 ] || apt-get update -qq || true    # a fresh machine has no list of packages
    {
        (cd "$folder" && apt-get download -qq prometheus 2>/dev/null)
        # Newer releases of Debian have promtool in a package of its own.
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
    echo "$0: there is no set of programs named $set; the sets are programs and prometheus"
    exit 64
    ;;
esac
