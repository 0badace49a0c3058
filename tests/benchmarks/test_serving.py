"""The benchmarks of the CPU service, each run on a tiny model; counts are checked, not times."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from benchmarks import batching, convbert, memory, overhead, peers, roofline, startup
from benchmarks.commands import main
from benchmarks.harness import findings, models_under_test
from benchmarks.harness.findings import Findings, Table, Target
from benchmarks.harness.flops import flops
from benchmarks.harness.generator import Load, Window, run
from benchmarks.harness.processes import running_server, service_command
from benchmarks.harness.texts import mix_lengths
from benchmarks.peers.compare import CONNECTIONS, PeerRun, _ratios, _targets, run_all
from benchmarks.peers.peer import Peer, interpreter, ours
from benchmarks.peers.peer import peers as all_peers
from command import BadInput, BadUsage, CommandError, Unavailable
from proof.measuring.launch import free_port
from service.batching.shapes import PACKED, Shapes
from tests import requirements

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks
TEXTS = [
    "a charming and often affecting journey",
    "bad",
    "no apparent joy",
    "it is not that the film is dull",
]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the tiny model is exported, once."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("bench")
        patch.setattr(models_under_test, "FOLDER", path)
        yield path


def test_the_roofline_counts_the_models_operations() -> None:
    result = roofline.measure("tiny", rounds=1, shapes=((1, 8), (2, 16)))
    config = json.loads(
        (models_under_test.model_under_test("tiny").checkpoint / "config.json").read_text()
    )
    model = models_under_test.model_under_test("tiny")
    # Two layers of 32: 4 × 32² + 2 × 32 × 64 multiplications a token, and attention's two products
    # of L × L × 32 a layer.
    assert flops(model.artifact, config, 2, 16) == 2 * 2 * 2 * (
        16 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 16 * 16 * 32
    )
    assert {row[0] for row in result.tables[0].rows} == set(model.variants)
    assert all(min(value["ops"]) > 0 for value in result.values.values())


def test_a_start_is_measured_until_ready_with_its_memory() -> None:
    result = startup.measure(("tiny",), rounds=1)
    for starts in result.values.values():
        [start] = starts
        assert 0 < start["ready_s"] < 120
        assert 10 * 2**20 < start["loaded"] < 2**30
        assert start["first_ms"] > 0


def test_what_cannot_be_measured_costs_nothing_of_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse() -> Findings:
        raise Unavailable("wrk is not installed.")

    monkeypatch.setattr(
        "benchmarks.all.plan",
        lambda *_: {"first": refuse, "second": lambda: Findings("second", "How many?", [])},
    )
    with pytest.raises(Unavailable, match="Not measured: first"):
        main(["all", "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "Not measured: wrk is not installed." in page
    assert "How many?" in page


def test_memory_is_looked_at_after_every_shape_was_met() -> None:
    result = memory.measure(("tiny",), short=True, requests=20)
    [row], [values] = result.tables[0].rows, result.values.values()
    longest = models_under_test.model_under_test("tiny").artifact.manifest.max_tokens
    assert values["shapes"] == sum(
        length > 2 for _, length in Shapes(longest, grid=PACKED).by_work()
    )
    assert values["seen"][-1][0] >= 20
    growth = memory.Growth(values["ready"], values["shapes"], values["met"], values["seen"])
    assert row[-1] == "{:+.2f} % ({:+.2f}…{:+.2f})".format(*growth.percent)


def test_batching_holds_every_choice_against_another() -> None:
    result = batching.measure("tiny", TEXTS * 20, rounds=1, seconds=0.3)
    assert [table.title for table in result.tables] == [
        "Padding by backlog",
        "Packed or unpacked",
        "Exact lengths or the grid's",
        "Streams",
        "Waiting for a fuller batch",
    ]
    assert all(target.holds is not None for target in result.targets)


def test_convberts_operations_are_the_papers() -> None:
    # papers.md counts 21.23 GFLOP for ConvBERT-base and 22.35 for BERT-base at 128 tokens, 88.56
    # and 96.64 at 512.
    assert convbert.flops_ratio("base", 128) == pytest.approx(21.23 / 22.35, abs=0.005)
    assert convbert.flops_ratio("base", 512) == pytest.approx(88.56 / 96.64, abs=0.005)
    result = convbert.measure(("tiny",), ((1, 8), (2, 16)), rounds=1)
    assert len(result.tables[0].rows) == 2


def test_the_overhead_is_what_the_servers_own_times_leave() -> None:
    model = models_under_test.model_under_test("tiny")
    result = overhead.engine_and_service(model, model.variants[-1], TEXTS, rounds=1, seconds=0.5)
    assert 0 < result["added_ms"][0] < result["alone_p50_ms"][0]
    assert result["engine_per_s"][0] > 0
    assert result["service_per_s"][0] > 0


def test_requests_that_are_served_in_turn_wait_as_queueing_theory_says() -> None:
    # M/M/1 at half load: the time in the system is exponential with mean 1 / (mu - lambda), here 20
    # ms.
    single = np.random.default_rng(0).exponential(10.0, 20_000)
    assert overhead.in_turn_p99_ms(single.tolist(), 50.0, seed=1) == pytest.approx(
        20 * np.log(100), rel=0.1
    )
    assert overhead.in_turn_p99_ms([10.0], 101.0, seed=1) == float("inf")
    # Hardly any load: nobody waits.
    assert overhead.in_turn_p99_ms([10.0], 0.1, seed=1) == pytest.approx(10.0, rel=0.05)


@requirements.wrk
def test_a_null_model_and_an_echo_are_counted_by_wrk() -> None:
    result = overhead.null_by_echo(TEXTS[0], rounds=1, seconds=1)
    assert result is not None
    assert min(result["echo"]) > 0
    assert min(result["null"]) > 0
    assert min(result["guarded"]) > 0


@pytest.mark.parametrize("phase", [0.1, 1.3, 2.9])
@pytest.mark.parametrize("batch", [8, 32])
def test_a_server_that_answers_in_batches_is_credited_with_whole_ones(
    batch: int, phase: float
) -> None:
    load = Load(1, "/", [], connections=32, seconds=6.0, warm_up_s=2.0, turns=3)
    window, answers = Window(load, started_at=0.0), []
    for number in itertools.count():
        if window.end < math.inf:
            break
        for place in range(batch):  # 8.8 texts a second, like a large model on one processor
            answers.append(phase + number * batch / 8.8 + place * 1e-6)
            window.count(answers[-1])
    counted = [at for at in answers if window.begin < at <= window.end]
    assert window.begin >= 2.0
    assert window.end - window.begin >= 6.0
    assert len(counted) >= 96
    assert len(counted) / (window.end - window.begin) == pytest.approx(8.8, rel=1e-3)


def test_the_generator_sends_what_it_is_told_and_counts_what_was_refused(tmp_path: Path) -> None:
    port = free_port()
    overhead.write_null_artifact(tmp_path / "null")
    with running_server(
        "null", service_command(str(tmp_path / "null"), port=port), port, tmp_path / "log"
    ) as server:
        bodies = [json.dumps({"input": text}) for text in TEXTS]
        closed = run(Load(port, "/classify", bodies, 3, 0.4, warm_up_s=0.1))
        assert closed.requests == len(closed.latencies_ms) == len(closed.service_ms) > 0
        assert closed.failed == 0
        opened = run(Load(port, "/classify", bodies, 2, 0.5, warm_up_s=0.1, rate=100))
        assert 10 < opened.requests < 120
        refused = run(Load(port, "/classify", ['{"input": ""}'], 1, 0.2, warm_up_s=0.0))
        assert refused.requests == 0
        assert refused.failed > 0
        assert server.cpu_seconds() > 0
        assert server.anonymous_bytes() > 2**20


def test_a_server_stays_on_its_processors_whatever_its_threads_ask_for(tmp_path: Path) -> None:
    # As ONNX Runtime does it: a thread that puts itself on every processor there is.
    wanders = (
        "import http.server, os, threading\ndef wander():\n os.sched_setaffinity(0,"
        " range(os.cpu_count())); threading.Event().wait()\nthreading.Thread(target=wander,"
        " daemon=True).start()\nhttp.server.ThreadingHTTPServer(('127.0.0.1',"
        f" {(port := free_port())}), http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    cpus = {min(os.sched_getaffinity(0))}
    with running_server(
        "wanderer", [sys.executable, "-c", wanders], port, tmp_path / "log", path="/", cpus=cpus
    ) as server:
        [pid] = server.pids()
        assert all(
            os.sched_getaffinity(int(thread.name)) == cpus
            for thread in Path(f"/proc/{pid}/task").glob("*")
        )


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match="nobody ended with 1 before it was ready: out of luck"),
        running_server(
            "nobody",
            [sys.executable, "-c", "raise SystemExit('out of luck')"],
            free_port(),
            tmp_path / "log",
        ),
    ):
        pass


def plain_openvino() -> Peer:
    """The peer that needs nothing but what is installed here."""
    peer = next(
        peer for peer in all_peers({"f32"}) if peer.name == "FastAPI + OpenVINO fp32, no batching"
    )
    return dataclasses.replace(peer, requirements=())


def test_peers_are_measured_in_turns_and_answer_what_we_answer() -> None:
    lost = dataclasses.replace(
        plain_openvino(),
        name="lost",
        command=lambda python, model, port: [
            sys.executable,
            "-c",
            "raise SystemExit('no such engine')",
        ],
    )
    running, absent = run_all(
        models_under_test.model_under_test("tiny"),
        [ours("cpu-fp32", "fp32"), plain_openvino(), lost],
        TEXTS,
        rounds=1,
        seconds=0.3,
    )
    assert [peer_run.peer.name for peer_run in running] == [
        "DrBERT Serve fp32",
        "FastAPI + OpenVINO fp32, no batching",
    ]
    assert absent == {"lost": "lost ended with 1 before it was ready: no such engine"}
    for peer_run in running:
        assert peer_run.agreement == 1
        assert peer_run.furthest < 1e-4
        assert all(rates[0] > 0 for rates in peer_run.rates.values())


def measured(peer: Peer, rate: float) -> PeerRun:
    return PeerRun(peer, None, rates={c: [rate, rate] for c in (1, 8, 32)})  # type: ignore[arg-type]


def test_ratios_are_of_the_best_and_of_the_same_precision() -> None:
    peers_by_name = {peer.name: peer for peer in all_peers({"f32", "i8"})}
    rates = {
        "DrBERT Serve fp32": 40.0,
        "DrBERT Serve int8": 100.0,
        "Infinity (torch engine)": 10.0,
        "FastAPI + optimum ORTModel fp32": 20.0,
        "FastAPI + optimum ORTModel int8": 60.0,
        "FastAPI + OpenVINO fp32, no batching": 20.0,
        "FastAPI + OpenVINO int8, no batching": 80.0,
    }
    running = [measured(peers_by_name[name], rate) for name, rate in rates.items()]
    table = _ratios("base", running, CONNECTIONS, "int8: ungated")
    rows = {row[0]: row for row in table.rows}
    assert table.note == "int8: ungated"
    assert table.columns[2:] == tuple(
        f"{column}, {c}"
        for column in ("our best (int8)", "ours in its precision")
        for c in (1, 8, 32)
    )
    assert [cell[:5] for cell in rows["Infinity (torch engine)"][2:]] == ["10.00"] * 3 + [
        "4.00 "
    ] * 3
    held = {target.name: (target.measured, target.holds) for target in _targets(running, 32)}
    assert held["our best by Infinity's torch engine"] == ("10.00", True)
    assert held["our best by the fastest over ONNX Runtime (FastAPI + optimum ORTModel int8)"] == (
        "1.67",
        False,
    )
    assert held["ours in int8 by OpenVINO without a batcher"] == ("1.25", False)


def test_a_peer_that_cannot_be_installed_says_why(tmp_path: Path) -> None:
    peer = dataclasses.replace(plain_openvino(), requirements=("no-such-package-anywhere==1",))
    with pytest.raises(Unavailable, match="cannot be installed"):
        interpreter(peer, tmp_path)


def test_a_server_that_answers_something_else_is_an_error() -> None:
    wrong = dataclasses.replace(plain_openvino(), answer=lambda response: ("NEGATIVE", 0.99))
    with pytest.raises(
        CommandError, match="answers something else than our fp32: a probability differs by 0"
    ):
        run_all(
            models_under_test.model_under_test("tiny"),
            [ours("cpu-fp32", "fp32"), wrong],
            TEXTS,
            rounds=1,
            seconds=0.3,
        )


def test_any_few_texts_in_a_row_are_about_as_long_as_all() -> None:
    texts = ["x" * (1 + i * i // 40) for i in range(128)]  # most are short, some very long
    ordered = mix_lengths(texts)
    assert sorted(ordered) == sorted(texts)
    mean = sum(map(len, texts)) / len(texts)
    for start in range(0, 128, 16):
        part = ordered[start : start + 16]
        assert abs(sum(map(len, part)) / 16 - mean) < 0.25 * mean
    assert mix_lengths(["only"]) == ["only"]


def test_a_page_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    findings.write(tmp_path / "R.md", "make it", [Findings("x", "Why?", [])])
    assert findings.read(tmp_path / "R.md", here_only=True)
    stored = json.loads((tmp_path / "R.json").read_text())
    stored["environment"]["processor"] = "another"
    (tmp_path / "R.json").write_text(json.dumps(stored))
    assert findings.read(tmp_path / "R.md")
    with pytest.raises(BadInput, match=r"measured elsewhere \(processor differ\)"):
        findings.read(tmp_path / "R.md", here_only=True)


@contextmanager
def slow_answers(seconds: float) -> Iterator[int]:
    """A server that takes its time with each answer; its port."""

    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            serving.join()


def test_an_answer_that_comes_after_an_open_loops_end_counts() -> None:
    """They are the slow ones: left out, the tail would look short."""
    with slow_answers(0.5) as port:
        result = run(Load(port, "/", ["x"], 1, 0.3, warm_up_s=0.0, rate=50.0))
    assert result.requests > 5
    assert min(result.latencies_ms) > 450  # timers end early by parts of a millisecond


def test_a_page_holds_tables_targets_and_where_it_ran(tmp_path: Path) -> None:
    result = Findings(
        "x",
        "Why?",
        [Table("t", ("a", "b"), [["1", "2"]], "Note.")],
        [
            Target("w", "≥ 1", "2", True),
            Target("v", "≥ 1", "0", False),
            Target("u", "≥ 1", "", None),
        ],
        {"n": [1.5]},
    )
    findings.write(tmp_path / "R.md", "make it", [result])
    page = (tmp_path / "R.md").read_text()
    for words in (
        "Made by `make it`",
        "## x",
        "| a | b |",
        "| w | ≥ 1 | 2 | holds |",
        "| v | ≥ 1 | 0 | **missed** |",
        "not measurable here",
    ):
        assert words in page
    assert json.loads((tmp_path / "R.json").read_text())["findings"][0]["values"] == {"n": [1.5]}
    assert findings.spread(np.array([1, 2, 3])) == "2.00 (1.50–2.50)"


def test_a_single_ratio_claims_no_quartiles() -> None:
    assert findings.spread([1.414]) == "1.41"


def test_a_name_that_no_peer_holds_is_refused() -> None:
    with pytest.raises(BadUsage, match="No peer's name contains nobody"):
        main(["peers", "--short", "--only", "nobody"])
    assert peers.measure is not None
