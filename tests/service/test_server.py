"""The service as a process, over a socket."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from command import Unavailable
from service import server
from service.__main__ import model_sources
from service.artifact import Artifact
from service.server import RECEIVE_BYTES, bind
from tests.factories import write_artifact
from tests.requirements import no_gpu


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a service as a process; its output is one text stream."""
    return subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


@contextmanager
def running(
    *arguments: str, scheme: str = "http", **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a service as a process, and yield its address and the process once it is ready."""
    port = free_port()
    process = start(*arguments, "--port", str(port), **environment)
    url = f"{scheme}://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 60
        while not ready(url):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.02)
        yield url, process
    finally:
        process.kill()
        process.__exit__(None, None, None)


@contextmanager
def serving(
    artifact: Artifact, name: str = "reviews", **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a service with one model as a process."""
    with running(f"{name}={artifact.directory}", **environment) as served:
        yield served


def ready(url: str) -> bool:
    """Return whether a service is ready; its certificate is not verified."""
    try:
        with urllib.request.urlopen(
            f"{url}/readyz",
            timeout=5,
            context=ssl._create_unverified_context() if url.startswith("https") else None,
        ):
            return True
    except OSError:
        return False


def classify(url: str, text: str) -> dict[str, Any]:
    # As a bare `curl -d` does it: a form's content type.
    request = urllib.request.Request(f"{url}/classify", json.dumps({"input": text}).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def until_one_of(processes: Sequence[subprocess.Popen[str]], condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail if none of the processes runs any more."""
    give_up = time.monotonic() + 60
    while not condition():
        assert any(process.poll() is None for process in processes)
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_started_server_classifies_and_exits_with_0_after_sigterm(artifact: Artifact) -> None:
    with serving(artifact) as (url, process):
        assert classify(url, "good film")["data"][0]["label"] == "POSITIVE"
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0
        events = [json.loads(line)["event"] for line in output.splitlines()]
    assert events == ["model ready", "ready", "draining", "drained"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_sigint_and_sighup_drain_too(artifact: Artifact, number: signal.Signals) -> None:
    before = signal.signal(
        number, signal.SIG_DFL
    )  # a child process inherits the handler that nohup sets
    try:
        with serving(artifact) as (_, process):
            process.send_signal(number)
            output = process.communicate(timeout=30)[0]
            assert process.returncode == 0
    finally:
        signal.signal(number, before)
    assert '"drained"' in output


def test_a_service_started_by_nohup_outlives_its_terminal(artifact: Artifact) -> None:
    ignoring = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child inherits it
    try:
        with serving(artifact) as (url, process):
            process.send_signal(signal.SIGHUP)
            assert classify(url, "good")["data"][0]["label"] == "POSITIVE"
            process.terminate()
            assert '"signal ignored"' not in process.communicate(timeout=30)[0]
            assert process.returncode == 0
    finally:
        signal.signal(signal.SIGHUP, ignoring)


def test_user_signals_are_ignored_and_logged(artifact: Artifact) -> None:
    with serving(artifact) as (url, process):
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGUSR2)
        assert classify(url, "good")["data"][0]["label"] == "POSITIVE"
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0
    assert sorted(
        json.loads(line).get("signal", "")
        for line in output.splitlines()
        if "signal ignored" in line
    ) == ["SIGUSR1", "SIGUSR2"]


def breaking(how: str, artifact: Artifact, port: int, **environment: str) -> subprocess.Popen[str]:
    """A service whose engine fails on FATAL's number of tokens."""
    command = [
        sys.executable,
        "-m",
        "tests.chaos.broken",
        how,
        f"reviews={artifact.directory}",
        "--port",
        str(port),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


FATAL = "good a b c a"


def test_a_paused_process_is_not_reported_as_stalled_when_it_continues(artifact: Artifact) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = breaking("slow", artifact, port, DRBERT_ENGINE_STALL_TIMEOUT_S="2")
    try:
        until_one_of([process], lambda: ready(url))
        with ThreadPoolExecutor(1) as callers:
            answer = callers.submit(classify, url, FATAL)
            until_one_of([process], lambda: b"drbert_inflight_requests 1" in metrics(url))
            process.send_signal(signal.SIGSTOP)
            time.sleep(6)  # three times the engine's limit
            process.send_signal(signal.SIGCONT)
            assert answer.result(timeout=60)["data"][0]["label"] == "POSITIVE"
        assert ready(url)
        process.terminate()
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0
        assert "the engine is stuck" not in output
    finally:
        process.kill()
        process.communicate()


def test_a_stalled_engine_is_also_detected_after_a_pause(artifact: Artifact) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = breaking("stalls", artifact, port, DRBERT_ENGINE_STALL_TIMEOUT_S="1")
    try:
        until_one_of([process], lambda: ready(url))
        with ThreadPoolExecutor(1) as callers:
            answer = callers.submit(classify, url, FATAL)
            until_one_of([process], lambda: b"drbert_inflight_requests 1" in metrics(url))
            process.send_signal(signal.SIGSTOP)
            time.sleep(2)
            process.send_signal(signal.SIGCONT)
            assert "the engine did not come back; ending" in process.communicate(timeout=60)[0]
            assert process.returncode == 70
            with pytest.raises(urllib.error.HTTPError) as refused:
                answer.result(timeout=60)
            refused.value.close()
            assert refused.value.code == 503
    finally:
        process.kill()
        process.communicate()


def metrics(url: str) -> bytes:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        content: bytes = page.read()
        return content


def test_at_the_limit_of_open_files_health_is_answered_and_the_reason_logged(
    artifact: Artifact,
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "service", f"reviews={artifact.directory}", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    idle: list[socket.socket] = []
    try:
        until_one_of([process], lambda: ready(url))
        for _ in range(200):  # that never send anything
            idle.append(socket.create_connection(("127.0.0.1", port), timeout=30))
        until_one_of([process], lambda: ready(url))
        until_one_of([process], lambda: answers(url))
        process.terminate()
        lines = [json.loads(line) for line in process.communicate(timeout=60)[0].splitlines()]
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
        for connection in idle:
            connection.close()
    [few] = [line for line in lines if line["event"].startswith("this process may open few files")]
    assert (few["limit"], few["recommended"]) == (64, 1024)
    near = [
        line
        for line in lines
        if line["event"].startswith("the limit of open files is near or reached")
    ]
    assert near
    assert near[0]["limit"] == 64
    assert len(near) < 10


def answers(url: str) -> bool:
    try:
        return bool(classify(url, "good")["data"][0]["label"] == "POSITIVE")
    except OSError:
        return False


HANGING = """
import itertools, sys, threading
from concurrent.futures import ThreadPoolExecutor
from service import classifier
from service.loading import engine
from service.__main__ import main

where, calls, load, encode = sys.argv[1], itertools.count(), engine.load, \
classifier.Classifier.encode

def hang(*given):
    print("hangs", flush=True)
    with ThreadPoolExecutor(1) as pool:    # the interpreter waits for its threads
        pool.submit(threading.Event().wait).result()

def hanging_load(*given):
    return load(*given) if next(calls) < ("start", "admin").index(where) else hang()

if where == "tokenizer":
    classifier.Classifier.encode = lambda own, text, *more: encode(own, text, *more) if len(text) \
< 1000 else hang()
else:
    engine.load = hanging_load
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", ["start", "admin", "tokenizer"])
def test_the_process_exits_with_0_after_its_drain_even_if_a_thread_hangs(
    artifact: Artifact, moment: str
) -> None:
    port, admin = free_port(), free_port()
    environment = os.environ | {"DRBERT_ADMIN_PORT": str(admin), "DRBERT_DRAIN_TIMEOUT_S": "1"}
    command = [
        sys.executable,
        "-c",
        HANGING,
        moment,
        f"reviews={artifact.directory}",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    asking: socket.socket | None = None
    try:
        if moment != "start":
            give_up = time.monotonic() + 60
            while not ready(f"http://127.0.0.1:{port}"):
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.02)
            target, body = {
                "admin": (f"{admin}/models/reviews", b"{}"),
                "tokenizer": (f"{port}/classify", json.dumps({"input": "good " * 1000}).encode()),
            }[moment]
            asked_port, _, path = target.partition("/")
            # Kept open; there is no answer to read.
            asking = socket.create_connection(("127.0.0.1", int(asked_port)))
            head = (
                f"POST /{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type:"
                f" application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            asking.sendall(head.encode() + body)
        while (line := process.stdout.readline()) != "hangs\n":
            assert line, "it ended before it hung"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        if asking is not None:
            asking.close()
        process.kill()
        process.__exit__(None, None, None)


def test_the_system_buffers_little_of_an_unread_body() -> None:
    """Socket buffers count as the container's memory.

    Without a limit they grow to megabytes for each connection.
    """
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= 2 * RECEIVE_BYTES


def test_a_service_with_a_certificate_serves_https(artifact: Artifact, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    files = {
        "DRBERT_TLS_CERTIFICATE": str(tmp_path / "certificate.pem"),
        "DRBERT_TLS_KEY": str(tmp_path / "key.pem"),
    }
    admin = free_port()
    with running(
        f"reviews={artifact.directory}", scheme="https", DRBERT_ADMIN_PORT=str(admin), **files
    ) as (url, process):
        trusting = ssl.create_default_context(cafile=str(tmp_path / "authority.pem"))
        request = urllib.request.Request(f"{url}/classify", b'{"input": "good"}')
        with urllib.request.urlopen(request, timeout=30, context=trusting) as response:
            assert json.load(response)["data"][0]["label"] == "POSITIVE"
        with urllib.request.urlopen(
            f"https://127.0.0.1:{admin}/livez", timeout=30, context=trusting
        ) as response:
            assert response.read() == b"ok\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    (tmp_path / "key.pem").write_text("no key")
    process = start(str(artifact.directory), "--port", "0", **files)
    assert "cannot be used for TLS" in process.communicate(timeout=60)[0]
    assert process.returncode == 69


def test_a_renewed_certificate_is_used_without_a_restart(
    artifact: Artifact, tmp_path: Path
) -> None:
    authority = trustme.CA()
    old, new = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")

    def write(chain: trustme.LeafCert, key: trustme.LeafCert) -> None:
        chain.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
        key.private_key_pem.write_to_path(tmp_path / "key.pem")

    def shown(port: int) -> str:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=30).strip()

    write(old, old)
    files = {
        "DRBERT_TLS_CERTIFICATE": str(tmp_path / "certificate.pem"),
        "DRBERT_TLS_KEY": str(tmp_path / "key.pem"),
    }
    admin = free_port()
    with running(
        f"reviews={artifact.directory}", scheme="https", DRBERT_ADMIN_PORT=str(admin), **files
    ) as (url, process):
        port = int(url.rpartition(":")[2])
        assert shown(port) == old.cert_chain_pems[0].bytes().decode().strip()
        # Half of a renewal: a certificate of another key than the one that lies there.
        write(new, old)
        give_up = time.monotonic() + 30
        assert process.stdout is not None
        while (
            "the new certificate cannot be used; the previous one stays in use"
            not in process.stdout.readline()
        ):
            assert time.monotonic() < give_up
        assert shown(port) == old.cert_chain_pems[0].bytes().decode().strip()
        write(new, new)
        while shown(port) != new.cert_chain_pems[0].bytes().decode().strip():
            assert time.monotonic() < give_up
            time.sleep(0.1)
        assert shown(admin) == shown(port)


def test_every_log_line_is_json_also_for_invalid_requests(artifact: Artifact) -> None:
    with serving(artifact) as (url, process):
        with socket.create_connection(
            ("127.0.0.1", int(url.rpartition(":")[2])), timeout=30
        ) as caller:
            caller.sendall(b"no request\r\n\r\n")
            assert caller.recv(100).startswith(b"HTTP/1.1 400")
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[0]
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert events.count("Invalid HTTP request received.") == 1


def test_no_text_and_no_key_is_ever_logged(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("zanzibar-key\n")
    with serving(
        artifact, DRBERT_LOG_LEVEL="DEBUG", DRBERT_API_KEYS_FILE=str(tmp_path / "keys")
    ) as (url, process):
        with pytest.raises(urllib.error.HTTPError) as stranger:
            classify(url, "good zanzibar")
        stranger.value.close()
        urllib.request.urlopen(
            urllib.request.Request(
                f"{url}/classify", b'{"input": "good zanzibar"}', {"X-API-Key": "zanzibar-key"}
            ),
            timeout=30,
        ).close()
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(
                urllib.request.Request(
                    f"{url}/classify",
                    b'{"input": "poison zanzibar"}',
                    {"X-API-Key": "zanzibar-key"},
                ),
                timeout=30,
            )
        failed.value.close()
        process.send_signal(signal.SIGTERM)
        assert "zanzibar" not in process.communicate(timeout=30)[0].replace(str(tmp_path), "")


def test_no_text_of_a_failure_is_logged(artifact: Artifact) -> None:
    with serving(artifact, DRBERT_LOG_LEVEL="DEBUG") as (url, process):
        classify(url, "good zanzibar")
        with pytest.raises(urllib.error.HTTPError):
            classify(url, "poison zanzibar")
        process.send_signal(signal.SIGTERM)
        assert "zanzibar" not in process.communicate(timeout=30)[0]


def test_an_answer_is_not_delayed_by_tcp_acknowledgements() -> None:
    with (
        bind("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use_is_reported_in_one_line_with_exit_code_69(artifact: Artifact) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(str(artifact.directory), "--port", str(taken.getsockname()[1]))
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 69
    assert output.count("\n") == 1
    assert "choose another with --port" in output


def test_of_two_servers_started_on_one_port_one_serves_and_the_other_exits_with_69(
    artifact: Artifact,
) -> None:
    port = free_port()
    both = [start(str(artifact.directory), "--port", str(port)) for _ in range(2)]
    try:
        until_one_of(
            both,
            lambda: (
                ready(f"http://127.0.0.1:{port}")
                and any(process.poll() is not None for process in both)
            ),
        )
        [refused] = [process for process in both if process.poll() is not None]
        output = refused.communicate(timeout=60)[0]
        assert refused.returncode == 69
        assert f"Port {port} of 127.0.0.1 is in use" in output
        assert "choose another with --port" in output
        assert classify(f"http://127.0.0.1:{port}", "good")["data"][0]["label"] == "POSITIVE"
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_only_one_socket_can_bind_a_port() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            Unavailable,
            match=f"Port {port} of 127.0.0.1 .*another server listens there.*DRBERT_ADMIN_PORT",
        ):
            bind("127.0.0.1", port, "DRBERT_ADMIN_PORT")
        with pytest.raises(Unavailable, match="another server listens there"):
            bind("0.0.0.0", port)


@pytest.mark.parametrize(
    "host",
    ["no-such-host.invalid", "a..b", "256.0.0.1", "\N{SNOWMAN}" * 70],
    ids=["unknown", "empty part", "no IPv4", "too long"],
)
def test_an_invalid_address_is_refused_with_the_remedy(host: str) -> None:
    with pytest.raises(Unavailable, match="choose another with --host"):
        bind(host, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 69, "drbert-export CHECKPOINT nowhere"),
        ([], 64, "MODEL"),
        (["--no-such-option"], 64, "usage"),
        (["a=x", "a=y"], 64, "Two models are called 'a'"),
        (["a", "--port", "99999"], 64, "--port 99999 is not a port"),
    ],
)
def test_a_failed_start_exits_with_its_code_and_the_remedy(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    process = start(*arguments)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert words in output
    assert "Traceback" not in output


def test_a_model_is_named_before_the_equals_sign_unless_the_path_has_it(tmp_path: Path) -> None:
    (tmp_path / "lr=3e-5").mkdir()
    folder = str(tmp_path / "lr=3e-5")
    assert model_sources([folder, "b=c=d"]) == {"lr=3e-5": folder, "b": "c=d"}


def test_a_modified_artifact_exits_with_65(artifact: Artifact) -> None:
    artifact.path("model.onnx").write_bytes(b"x")
    process = start(str(artifact.directory))
    assert "model.onnx has changed since export" in process.communicate(timeout=60)[0]
    assert process.returncode == 65


def test_an_artifact_with_correct_digests_but_no_model_exits_with_65(tmp_path: Path) -> None:
    process = start(
        str(write_artifact(tmp_path / "broken", files_as={"tokenizer.json": "{}"}).directory),
        "--port",
        str(free_port()),
    )
    output = process.communicate(timeout=60)[0]
    assert "broken cannot be loaded (" in output
    assert "Traceback" not in output
    assert process.returncode == 65


def test_an_invalid_environment_variable_is_named(artifact: Artifact) -> None:
    process = start(str(artifact.directory), DRBERT_THREADS="many")
    assert "DRBERT_THREADS" in process.communicate(timeout=60)[0]
    assert process.returncode == 64


def test_limits_that_could_never_admit_a_full_list_are_refused_at_start(artifact: Artifact) -> None:
    process = start(str(artifact.directory), DRBERT_MAX_QUEUE_SIZE="10")
    assert (
        "DRBERT_MAX_TEXTS (1000) is above DRBERT_MAX_QUEUE_SIZE (10)"
        in process.communicate(timeout=60)[0]
    )
    assert process.returncode == 64


def test_limits_that_could_never_admit_a_full_body_are_refused_at_start(artifact: Artifact) -> None:
    process = start(str(artifact.directory), DRBERT_MAX_INFLIGHT_BODY_BYTES="1000")
    assert (
        "DRBERT_MAX_BODY_BYTES (4194304) is above DRBERT_MAX_INFLIGHT_BODY_BYTES (1000)"
        in process.communicate(timeout=60)[0]
    )
    assert process.returncode == 64


def test_a_runtime_or_variant_that_is_named_but_unavailable_fails_the_start(
    artifact: Artifact,
) -> None:
    process = start(str(artifact.directory), "--port", str(free_port()), "--variant", "cpu-bf16")
    assert "holds no variant 'cpu-bf16'" in process.communicate(timeout=60)[0]
    assert process.returncode == 69


@no_gpu
def test_a_missing_gpu_fails_the_start_and_is_named(tmp_path: Path) -> None:
    held = write_artifact(tmp_path / "held")
    on_cpu = held.manifest.variants["cpu-fp32"]
    both = write_artifact(
        tmp_path / "both",
        variants={
            "cpu-fp32": on_cpu,
            "cuda-fp16": on_cpu.model_copy(update={"runtime": "cuda", "precision": "f16"}),
        },
    )
    by_name = start(str(both.directory), "--port", str(free_port()), "--variant", "cuda-fp16")
    by_runtime = start(str(both.directory), "--port", str(free_port()), DRBERT_RUNTIME="cuda")
    without = start(str(held.directory), "--port", str(free_port()), DRBERT_RUNTIME="cuda")
    for process, message in (
        (by_name, "no NVIDIA driver"),
        (by_runtime, "no NVIDIA driver"),
        (without, "export it with --variants cpu-fp32,cuda-fp16"),
    ):
        output = process.communicate(timeout=60)[0]
        assert message in output
        assert output.count("\n") == 1
        assert process.returncode == 69


def test_a_server_that_accepts_injected_delays_stays_on_loopback(artifact: Artifact) -> None:
    process = start(str(artifact.directory), "--host", "0.0.0.0", DRBERT_BUSY_WAIT="loopback")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 64
    assert "DRBERT_BUSY_WAIT=loopback and --host 0.0.0.0 do not go together" in output


def test_two_colons_mean_every_address_of_both_families() -> None:
    with contextlib.closing(bind("::", 0)) as listening:
        port = listening.getsockname()[1]
        hosts = ["127.0.0.1"] + (["::1"] if listening.family == socket.AF_INET6 else [])
        for host in hosts:
            socket.create_connection((host, port), timeout=10).close()


def test_two_colons_mean_ipv4_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_has_ipv6", lambda: False)
    with contextlib.closing(bind("::", 0)) as listening:
        assert listening.family == socket.AF_INET
