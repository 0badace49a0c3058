#!/bin/sh
# pip install, asked again when a registry breaks off: sh install.sh PYTHON ARGUMENT… pip itself asks for the rest at once, a few
# times, which does not outlast a registry's bad minute; what came whole is in pip's cache. Any other failure is told at once.
set -u
python=$1
shift
complaints=$(mktemp)
trap 'rm -f "$complaints"' EXIT

for wait in ${INSTALL_WAITS-10 30 90 180} never; do
    "$python" -m pip install "$@" 2>"$complaints"
    status=$?
    cat "$complaints" >&2
    [ "$status" != 0 ] || exit 0
    [ "$wait" != never ] && grep -qiE 'connection|incomplete.download|timed.?out|HTTP error (429|5)' "$complaints" || exit "$status"
    echo "A registry broke off; asking again in $wait s" >&2
    sleep "$wait"
done
