#!/bin/sh
# pip install that is retried when a registry closes the connection: sh install.sh PYTHON ARGUMENT…
# pip itself resumes a download a few times without a pause, which is not enough when a registry fails for a minute. Complete packages stay in
# pip's cache. Any other failure ends the installation at once. INSTALL_WAITS holds the pauses in seconds (default: 10 30 90 180).
set -u
python=$1
shift
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

for wait in ${INSTALL_WAITS-10 30 90 180} never; do
    "$python" -m pip install "$@" 2>"$errors"
    status=$?
    cat "$errors" >&2
    [ "$status" != 0 ] || exit 0
    [ "$wait" != never ] && grep -qiE 'connection|incomplete.download|timed.?out|HTTP error (429|5)' "$errors" || exit "$status"
    echo "The registry closed the connection; retrying in $wait s" >&2
    sleep "$wait"
done
