"""Logs: a thread writes the lines, so no reader can stop the service; a limit per place in the code
keeps callers from filling a disk.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from service.artifact import Artifact
from service.telemetry import logs
from service.telemetry.logs import (
    BURST,
    FIELD_CHARS,
    LINES_PER_S,
    QUEUED_LINES,
    EventFormatter,
    LineFormat,
    LineWriter,
    RateLimit,
    json_line,
    text_line,
)
from tests.service.test_server import classify, free_port, ready, serving

F_SETPIPE_SZ = 1031


def record(
    event: str = "an event", level: int = logging.WARNING, line: int = 1, **facts: Any
) -> logging.LogRecord:
    return logging.makeLogRecord(
        {
            "msg": event,
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "pathname": "a.py",
            "lineno": line,
        }
        | facts
    )


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """Yield the reading and the writing end of a full pipe."""
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        try:
            while True:
                os.write(writing, b"x" * 4096)
        except BlockingIOError:
            pass
        with pytest.raises(BlockingIOError):
            os.write(writing, b"x")
        os.set_blocking(writing, True)
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


StartWriter = Callable[..., LineWriter]


@pytest.fixture
def start_writer() -> Iterator[StartWriter]:
    """Yield a function that starts a LineWriter with its own copy of a descriptor.

    The copy is closed only after the writer's thread has ended. The number of a closed descriptor
    is used again, so a thread that is still there would write into another test's file.
    """
    before = set(threading.enumerate())
    writers: dict[int, LineWriter] = {}

    def start(descriptor: int, line: LineFormat = json_line) -> LineWriter:
        copy = os.dup(descriptor)
        writers[copy] = LineWriter(copy, line=line)
        return writers[copy]

    yield start
    for writer in writers.values():
        writer.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    for copy in writers:
        os.close(copy)


def read_available(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    read = b""
    try:
        while chunk := os.read(descriptor, 65_536):
            read += chunk
    except BlockingIOError:
        pass
    return read


def read_until(descriptor: int, *ends: str) -> bytes:
    """Read until all of `ends` have been read."""
    read = b""
    give_up = time.monotonic() + 60
    while not all(end.encode() in read for end in ends):
        assert time.monotonic() < give_up
        time.sleep(0.001)
        read += read_available(descriptor)
    return read


def parsed(written: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.decode().splitlines()]


def send_malformed(port: int, times: int) -> None:
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as caller:
            caller.sendall(b"no request\r\n\r\n")
            assert caller.recv(100).startswith(b"HTTP/1.1 400")


@contextmanager
def serving_into(artifact: Artifact, stderr: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Yield the address and the process of a ready service that logs to a file descriptor."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "service",
        f"reviews={artifact.directory}",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 60
        while not ready(url):
            assert process.poll() is None
            assert time.monotonic() < give_up, "it does not become ready"
            time.sleep(0.02)
        yield url, process
    finally:
        process.kill()
        process.wait()


def test_a_service_whose_log_nobody_reads_answers_and_ends(artifact: Artifact) -> None:
    with full_pipe() as (reading, writing), serving_into(artifact, writing) as (url, process):
        port = int(url.rpartition(":")[2])
        # More than the allowance, so that lines are suppressed too while the writer hangs.
        send_malformed(port, 2 * int(BURST))
        with urllib.request.urlopen(f"{url}/livez", timeout=30) as response:
            assert response.read() == b"ok\n"
        assert classify(url, "good film")["data"][0]["label"] == "POSITIVE"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        # The pipe was full all the time, so it holds no log line.
        assert set(read_available(reading)) == {ord("x")}


def test_a_service_whose_log_reader_ended_answers_and_ends(artifact: Artifact) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with serving_into(artifact, writing) as (url, process):
            send_malformed(int(url.rpartition(":")[2]), 5)
            assert classify(url, "good film")["data"][0]["label"] == "POSITIVE"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
    finally:
        os.close(writing)


def test_a_flood_of_malformed_requests_writes_few_lines(artifact: Artifact) -> None:
    with serving(artifact) as (url, process):
        began = time.monotonic()
        send_malformed(int(url.rpartition(":")[2]), 400)
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            page = response.read().decode()
        process.send_signal(signal.SIGTERM)
        lines = parsed(process.communicate(timeout=30)[0].encode())
        took = time.monotonic() - began
    warnings = [
        line
        for line in lines
        if line["level"] == "warning" and line["event"] != "log lines suppressed"
    ]
    assert 0 < len(warnings) <= BURST + LINES_PER_S * took
    assert 'drbert_log_lines_dropped_total{reason="rate_limited"}' in page


def test_suppressed_lines_are_counted_in_a_summary_and_in_metrics(
    start_writer: StartWriter,
) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 1_048_576)  # Nobody reads before the end.
    before = logs.LOST["rate_limited"]
    writer = start_writer(writing)
    for _ in range(400):
        writer.handle(record("from a caller"))
    writer.flush()
    lines = parsed(read_available(reading))
    written = [line for line in lines if line["event"] == "from a caller"]
    summaries = [line for line in lines if line["event"] == "log lines suppressed"]
    assert len(written) >= BURST
    assert {line["of"] for line in summaries} == {"from a caller"}
    assert len(written) + sum(line["lines"] for line in summaries) == 400
    assert logs.LOST["rate_limited"] == before + 400 - len(written)
    os.close(reading)
    os.close(writing)


def test_lines_that_do_not_fit_are_dropped_oldest_first_and_counted(
    start_writer: StartWriter,
) -> None:
    with full_pipe() as (reading, writing):
        writer = start_writer(writing)
        for number in range(QUEUED_LINES + 500):
            writer.handle(record(f"event {number}", logging.INFO))
        read = read_until(reading, f"event {QUEUED_LINES + 499}", "dropped")
    lines = parsed(read.lstrip(b"x"))
    [summary] = [line for line in lines if line["event"] == "log lines dropped"]
    written = [int(line["event"].split()[1]) for line in lines if line is not summary]
    # The writer already held the first line when the pipe was full.
    assert written[1:] == list(range(QUEUED_LINES + 500 - len(written) + 1, QUEUED_LINES + 500))
    assert summary["lines"] + len(written) == QUEUED_LINES + 500


def test_a_flush_writes_earlier_lines_and_does_not_wait_for_ever(start_writer: StartWriter) -> None:
    reading, writing = os.pipe()
    writer = start_writer(writing)
    for number in range(100):
        writer.handle(record(f"event {number}", logging.INFO))
    writer.flush()
    assert [line["event"] for line in parsed(read_available(reading))] == [
        f"event {number}" for number in range(100)
    ]
    with full_pipe() as (full_reading, full):
        stuck = start_writer(full)
        stuck.handle(record())
        stuck.flush()  # returns
        assert read_until(full_reading, "an event")
    os.close(reading)
    os.close(writing)


def test_a_flushed_line_is_written_before_the_process_exits_at_once() -> None:
    code = (
        "import logging, os; from service.telemetry import logs; logs.set_up('INFO');"
        " logging.critical('the end', extra={'n': 1}); logs.flush(); os._exit(70)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert process.returncode == 70
    [line] = parsed(process.stderr)
    assert (line["event"], line["n"], line["level"]) == ("the end", 1, "critical")


def test_pythons_own_messages_to_stderr_are_lines_of_the_log() -> None:
    code = """
import threading, warnings
from service.telemetry import logs
logs.set_up("INFO")
warnings.warn("beware")
class Failing:
    def __del__(self):
        raise ValueError("in __del__")
Failing()
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start()
thread.join()
"""
    process = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, check=True
    )
    warned, unraisable, failed = parsed(process.stderr)
    assert "UserWarning: beware" in warned["event"]
    assert "ValueError: in __del__" in unraisable["traceback"]
    assert (failed["event"], failed["thread_name"]) == ("a thread failed", "worker")
    assert failed["traceback"].endswith("ZeroDivisionError: division by zero")


def test_a_place_has_a_burst_then_a_rate_and_does_not_limit_others() -> None:
    now = 0.0
    limit = RateLimit(lambda: now)
    assert [limit.filter(record(f"from a caller: {n}")) for n in range(int(BURST) + 10)] == [
        True
    ] * int(BURST) + [False] * 10
    assert limit.filter(record(line=2))
    assert limit.filter(record(level=logging.CRITICAL))
    assert limit.filter(record(level=logging.INFO))
    [summary] = limit.summaries()
    assert (summary["lines"], summary["of"]) == (10, f"from a caller: {int(BURST) + 9}")
    assert limit.summaries() == []
    now = 1.0
    assert sum(limit.filter(record()) for _ in range(100)) == LINES_PER_S


def test_a_line_that_cannot_be_formatted_is_only_counted(
    start_writer: StartWriter, capfd: pytest.CaptureFixture[str]
) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError

    reading, writing = os.pipe()
    writer = start_writer(writing)
    before = logs.LOST["write_failed"]
    writer.handle(record("%d texts", args=("many",)))
    writer.handle(record(fact=Unprintable()))
    writer.handle(record("after"))
    writer.flush()
    assert [line["event"] for line in parsed(read_available(reading))] == ["after"]
    assert logs.LOST["write_failed"] == before + 2
    assert capfd.readouterr().err == ""
    os.close(reading)
    os.close(writing)


def test_a_descriptor_that_does_not_block_gets_whole_lines(start_writer: StartWriter) -> None:
    with full_pipe() as (reading, writing):
        os.set_blocking(writing, False)
        writer = start_writer(writing)
        writer.handle(record("x" * FIELD_CHARS, logging.INFO))
        writer.handle(record("last", logging.INFO))
        read = read_until(reading, "last")
    assert [len(line["event"]) for line in parsed(read.lstrip(b"x"))] == [FIELD_CHARS, 4]


def test_a_long_field_keeps_its_beginning_and_its_end() -> None:
    line = json.loads(
        EventFormatter(json_line).format(
            record("a" + "x" * 100_000 + "z", path=Path("p" * 100_000))
        )
    )
    assert line["event"].startswith("ax")
    assert line["event"].endswith("xz")
    assert "91810 characters left out" in line["event"]
    assert len(line["path"]) < FIELD_CHARS + 100


def test_a_line_that_is_logged_while_another_is_queued_does_not_block_the_log() -> None:
    """A signal handler logs on the same thread at any instruction, as a __del__ might."""
    code = """
import logging, signal
from service.telemetry import logs
logs.set_up("INFO")
signal.signal(signal.SIGALRM, lambda *_: logging.info("interrupts"))
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
for _ in range(30_000):
    logging.info("interrupted")
signal.setitimer(signal.ITIMER_REAL, 0)
logging.info("the end")
logs.flush()
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=120
    )
    assert parsed(process.stderr)[-1]["event"] == "the end"


def test_a_line_for_people_has_the_time_the_level_the_event_and_the_facts() -> None:
    line = text_line(0.0, {"level": "info", "event": "ready", "url": "http://x", "models": ["a"]})
    assert line[2:].split(" ", 1)[1] == 'INFO    ready url=http://x models=["a"]'
    quoted = text_line(0.0, {"level": "error", "event": "x", "why": "not found", "none": None})
    assert quoted.endswith('ERROR   x why="not found" none=null')


def test_a_line_for_people_keeps_a_traceback_readable_and_a_terminal_safe() -> None:
    fields = {"level": "error", "event": "bug\x1b[2J", "path": "/a\nb", "traceback": "one\n\ttwo"}
    first, *rows = text_line(0.0, fields).splitlines()
    assert first.endswith('bug\\x1b[2J path="/a\\nb"')
    assert rows == ["    one", "    \\ttwo"]


@pytest.mark.parametrize("line", [text_line, json_line])
def test_no_value_ends_the_log_or_reaches_a_terminal_as_a_command(
    start_writer: StartWriter, line: LineFormat
) -> None:
    reading, writing = os.pipe()
    writer = start_writer(writing, line=line)
    for value in ("\ud800", "\u009b2J", "\u202eabc", 'a "quoted" one', "last"):
        writer.emit(record("\ud801 \x1b[2J", path=value))
    writer.flush()
    lines = read_available(reading).decode().splitlines()
    os.close(reading)
    os.close(writing)
    assert len(lines) == 5
    assert "last" in lines[-1]
    assert all(part.isprintable() for part in lines)


def test_requests_do_not_push_other_events_out_of_the_log(start_writer: StartWriter) -> None:
    with full_pipe() as (_, writing):
        writer = start_writer(writing)
        before = logs.LOST["queue_full"]
        requests = record("request", level=logging.INFO)
        requests.name = logs.ACCESS
        for _ in range(QUEUED_LINES):
            writer.emit(requests)
        assert logs.LOST["queue_full"] - before >= QUEUED_LINES // 2 - 1
        writer.emit(record("an event"))
        assert logs.LOST["queue_full"] - before <= QUEUED_LINES // 2 + 1


def test_logs_are_text_at_a_terminal_and_json_elsewhere(artifact: Artifact) -> None:
    leader, follower = os.openpty()
    port = str(free_port())
    process = subprocess.Popen(
        [sys.executable, "-m", "service", str(artifact.directory), "--port", port],
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    try:
        while not ready(f"http://127.0.0.1:{port}"):
            time.sleep(0.05)
        process.terminate()
        process.wait(30)
        output = b""
        with suppress(OSError):  # the end of a terminal's output
            while piece := os.read(leader, 65536):
                output += piece
    finally:
        process.kill()
        os.close(leader)
    lines = output.decode().splitlines()
    assert any(f" INFO    ready url=http://127.0.0.1:{port} docs=http" in line for line in lines)
    assert not any(line.startswith("{") for line in lines)


def test_the_access_log_names_each_request_and_never_its_text(artifact: Artifact) -> None:
    with serving(artifact, DRBERT_ACCESS_LOG="true") as (url, process):
        assert classify(url, "secret")["data"]
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/nowhere?secret=1")
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/models/other", b'{"inputs": "secret"}')
        urllib.request.urlopen(f"{url}/livez").close()
        process.terminate()
        output = process.communicate(timeout=30)[0]
    events = [json.loads(line) for line in output.splitlines()]
    requests = {event["path"]: event for event in events if event["event"] == "request"}
    answered = requests["/classify"]
    assert (answered["status"], answered["model"], answered["texts"]) == (200, "reviews", 1)
    assert answered["tokens"] > 0
    assert answered["ms"] > 0
    assert len(answered["request_id"]) == 32
    assert answered["client"] == "127.0.0.1"
    assert "error_code" not in answered
    assert (requests["/nowhere"]["status"], requests["/nowhere"]["error_code"]) == (
        404,
        "not_found",
    )
    assert requests["/models/other"]["error_code"] == "model_not_found"
    assert "/livez" not in requests
    assert "secret" not in output
