#!/bin/sh
# A tour of a few minutes: serve both twins, classify a sentence, compare their graphs, count their work, compare their latency.
# `make demo` exports the artifacts and runs it.
set -eu
PORT=${PORT:-8000}
SENTENCE="a charming and often affecting journey"
# A proxy of the environment cannot reach this host's own servers.
no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
NO_PROXY=$no_proxy
export no_proxy NO_PROXY

command -v curl >/dev/null || { echo "curl is not installed; the demo sends its requests with it." >&2; exit 69; }
if curl --silent --output /dev/null "http://127.0.0.1:$PORT/"; then
    echo "Port $PORT is in use; stop what serves there, or choose another one: PORT=8009 make demo" >&2
    exit 69
fi
log=$(mktemp)
"$BIN/drbert-serve" bert=artifacts/bert drbert=artifacts/drbert --port "$PORT" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$log"' EXIT
trap 'exit 130' INT TERM

echo
echo "== Both twins answer over HTTP"
until curl --silent --fail --output /dev/null "http://127.0.0.1:$PORT/readyz"; do
    if ! kill -0 "$server" 2>/dev/null; then
        cat "$log" >&2
        exit 69
    fi
    sleep 0.2
done
for model in bert drbert; do
    printf '%-7s %s  ' "$model" "$SENTENCE"
    curl --silent --fail "http://127.0.0.1:$PORT/classify" -d "{\"input\":\"$SENTENCE\",\"model\":\"$model\"}" |
        "$BIN/python" -c 'import json, sys; answer = json.load(sys.stdin)["data"][0]; print(answer["label"], round(answer["score"], 3))'
done
kill "$server"
wait "$server"
trap 'rm -f "$log"' EXIT

echo
echo "== Do they do the same work?"
"$BIN/drbert-prove" identity artifacts/bert artifacts/drbert
echo
echo "== And with the decoder left in?"
code=0
"$BIN/drbert-prove" identity artifacts/bert artifacts/drbert-with-decoder || code=$?
if [ "$code" -ne 1 ]; then
    echo "identity should have detected the kept decoder (exit 1), but it ended with $code." >&2
    exit 70
fi

echo
echo "== Do they execute the same instructions? (counted, about a minute)"
code=0
"$BIN/drbert-prove" work --quick artifacts/bert artifacts/drbert || code=$?
case $code in
    0) work="same instructions, within ±0.1 %" ;;
    2) work="instructions: two copies of one model disagree, so they tell nothing" ;;
    1) work="instructions: they differ (see above)" ;;
    130) exit 130 ;;
    *) work="instructions were not counted (see above)" ;;
esac

echo
echo "== Do they take the same time? (sixteen starts of a server, about four minutes)"
code=0
judged=$(mktemp)
trap 'rm -f "$log" "$judged"' EXIT
timeout --signal=INT 900 "$BIN/drbert-prove" run examples/plans/demo.toml >"$judged" || code=$?
cat "$judged"
# Time is measured on whatever else this machine does. What was measured is reported, and does not decide how the demo ends.
case $code in
    0) time="see the lines above" ;;
    1) time="a difference was measured, although graphs and instructions are the same: other work on this machine may be the cause" ;;
    2) time="this machine was too busy to decide everything; what is open stands above" ;;
    3) time="this machine was too busy to time it: a check of the measurement failed (FAIL above). Try again on a quiet machine" ;;
    124) time="it took longer than 15 minutes and was ended; try again on a quiet machine" ;;
    130) exit 130 ;;
    *) time="it was not measured (see above)" ;;
esac

echo
echo "== In short"
echo "same graph"
echo "$work"
grep -E '^  (CPU|wall) time: ' "$judged" | cut -c3- || true
echo "time: $time"
