"""
What HTTP, queue and answer add to the engine: one connection, saturated, half loaded, and with a
model that does nothing.

    python -m benchmarks overhead [--short] [--texts FILE] [--out FILE]
    python -m benchmarks overhead --before CHECKOUT    what has changed since another checkout of
                                                       this repository

`wrk` (Debian: apt-get install wrk) counts the requests of the last, for no Python generator would
keep up.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import generator
from benchmarks.harness.findings import (
    Findings,
    Table,
    Target,
    at_least,
    at_most,
    markdown,
    spread,
    write,
)
from benchmarks.harness.generator import Load
from benchmarks.harness.models_under_test import MINI, Subject, subject
from benchmarks.harness.processes import Process, free_port, halves, our_service, started
from benchmarks.harness.texts import TEXTS, evenly, read_lines
from command import Parser, Unavailable
from service.artifact import MANIFEST, Gate, Manifest, Parity, Variant, sealed, sha256

CONNECTIONS = 32
WRK = """
wrk.method = "POST"
wrk.body = '{body}'
wrk.headers["Content-Type"] = "application/json"
"""
# Whatever can be asked of a request is.
GUARDED = {
    "DRBERT_MAX_REQUEST_TOKENS": "100000",
    "DRBERT_SATURATED_AFTER_S": "10",
    "DRBERT_CORS_ORIGINS": "https://a.example",
}
GUARDED_HEADERS = {
    "Authorization": "Bearer key-7",
    "X-Request-Timeout-Ms": "5000",
    "Origin": "https://a.example",
}
ECHO = """
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/json")

app = Starlette(routes=[
    Route("/classify", echo, methods=["POST"]), Route("/readyz", lambda request: Response("ok")),
])
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks overhead",
        description="Measure what the service adds to its engine.",
    )
    parser.add_argument("--short", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini", "base")
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="texts to send, one a line (default: some that come along)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="only compare with another checkout of this repository, such as a git worktree",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    given = parser.parse_args(arguments)
    lines, rounds, seconds = (
        read_lines(given.texts),
        2 if given.short else 5,
        4 if given.short else 15,
    )
    if given.before is None:
        found = measure(given.sizes, lines, rounds, seconds)
    else:
        found = compare(given.before.resolve(), lines, 4 * rounds, min(seconds, 2))
    print(markdown(found))
    if given.out is not None:
        write(
            given.out,
            "python -m benchmarks overhead" + (" --before CHECKOUT" if given.before else ""),
            [found],
        )
    return 0


def measure(sizes: Sequence[str], texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    tables, targets, values = [], [], {}
    rows = []
    for size in sizes:
        each = subject(size)
        variant = each.variants[-1]
        found = engine_and_service(each, variant, texts, rounds, seconds)
        values[f"{size} {variant}"] = found
        added = float(np.median(found["added_ms"]))
        delivered = np.array(found["service_per_s"]) / np.array(found["engine_per_s"])
        tail, in_turn = (
            np.array(found[key]) / np.array(found["alone_p50_ms"])
            for key in ("half_p99_ms", "in_turn_p99_ms")
        )
        rows.append(
            [
                size,
                variant,
                f"{np.median(found['alone_p50_ms']):.2f}",
                spread(found["added_ms"]),
                f"{np.median(found['engine_per_s']):.0f}",
                f"{np.median(found['service_per_s']):.0f}",
                spread(delivered),
                spread(tail, 1),
                spread(in_turn, 1) if np.isfinite(in_turn).all() else "does not keep up",
                f"{np.median(found['generator_share']):.0%}",
            ]
        )
        targets += [
            at_most(
                f"{size}: p50 at one connection beyond tokenising and inference", added, 0.5, " ms"
            ),
            at_least(
                f"{size}: the engine's own rate that reaches {CONNECTIONS} connections",
                float(np.median(delivered)),
                0.8,
            ),
            at_most(
                f"{size}: p99 at half load by the time of one request alone",
                float(np.median(tail)),
                3.0,
            ),
        ]
    tables.append(
        Table(
            "The service over its engine",
            (
                "size",
                "variant",
                "one connection: p50, ms",
                "of it beyond tokens and inference, ms",
                "engine alone, texts/s",
                f"{CONNECTIONS} connections, texts/s",
                "service by engine",
                "half load: p99 by one request alone",
                "the same, served one by one",
                "generator, of a processor",
            ),
            rows,
            "Engine alone: the texts sorted by length, in batches of 16, in a process of its own."
            f" Half load: Poisson arrivals at half the rate of {CONNECTIONS} connections, each"
            " request timed from when it was due. Served one by one: what a queue without batches"
            " would make of the same arrivals and the times of single requests (simulated).",
        )
    )
    null = null_by_echo(texts[0], rounds, min(seconds, 5.0))
    if null is None:
        targets.append(
            Target(
                "a model that does nothing, by a bare echo",
                "≥ 0.50",
                "wrk is not installed (apt-get install wrk)",
                None,
            )
        )
    else:
        values["null"] = null
        echo, nothing, guarded = (np.array(null[name]) for name in ("echo", "null", "guarded"))
        tables.append(
            Table(
                "A model that does nothing",
                (
                    "",
                    "requests/s",
                    "by the echo",
                    "one connection: p50, ms",
                    "of it tokens and inference, ms",
                ),
                [
                    [
                        "Starlette echo under uvicorn",
                        f"{np.median(echo):,.0f}",
                        "1",
                        f"{np.median(null['echo_p50_ms']):.2f}",
                        "–",
                    ],
                    [
                        "POST /classify, null model",
                        f"{np.median(nothing):,.0f}",
                        spread(nothing / echo),
                        f"{np.median(null['null_p50_ms']):.2f}",
                        f"{np.median(null['null_own_ms']):.2f}",
                    ],
                    [
                        "the same with keys, CORS, a deadline and every limit",
                        f"{np.median(guarded):,.0f}",
                        spread(guarded / echo),
                        "–",
                        "–",
                    ],
                ],
                f"wrk, {CONNECTIONS} connections, one processor for the server; one connection by"
                " the generator of the other benchmarks, whose own time and two wake-ups of an"
                " idle processor are in the echo's p50 too. The null model still tokenises,"
                " batches and answers.",
            )
        )
        targets.append(
            at_least(
                "a model that does nothing, by a bare echo", float(np.median(nothing / echo)), 0.5
            )
        )
        targets.append(
            at_least(
                "the same with keys, CORS, a deadline and every limit, by without",
                float(np.median(guarded / nothing)),
                0.95,
            )
        )
        for size in sizes:
            # What they take of a processor, by what a whole request of a model that does something
            # takes.
            taken_ms = 1000 * (1 / guarded - 1 / nothing)
            share = float(np.median(taken_ms)) / float(
                np.median(values[f"{size} {subject(size).variants[-1]}"]["alone_p50_ms"])
            )
            targets.append(
                at_most(
                    f"keys, CORS, a deadline and every limit, of a request to {size} alone",
                    share,
                    0.05,
                )
            )
    return Findings(
        "overhead",
        "What do HTTP, the queue and the answer add to the engine?",
        tables,
        targets,
        values,
    )


def engine_and_service(
    each: Subject, variant: str, texts: Sequence[str], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """In turns: the engine alone in its own process, and the service with one connection, many, and
    at half load.
    """
    ours, theirs = halves()
    bodies = [json.dumps({"input": text}) for text in evenly(texts)]
    found: dict[str, list[float]] = {
        key: []
        for key in (
            "engine_per_s",
            "service_per_s",
            "alone_p50_ms",
            "added_ms",
            "half_p99_ms",
            "in_turn_p99_ms",
            "generator_share",
        )
    }
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        started(
            each.name,
            our_service(str(each.artifact.directory), "--variant", variant, port=port),
            port,
            Path(folder) / "log",
            cpus=ours,
        ) as server,
    ):
        generator.run(
            Load(port, "/classify", bodies, CONNECTIONS, seconds), theirs
        )  # every shape is met once before anything counts
        for number in range(rounds):
            server.pause()
            found["engine_per_s"].append(offline(each, variant, texts, seconds, ours))
            server.go_on()
            alone = generator.run(Load(port, "/classify", bodies, 1, seconds), theirs)
            many = generator.run(Load(port, "/classify", bodies, CONNECTIONS, seconds), theirs)
            half = generator.run(
                Load(
                    port,
                    "/classify",
                    bodies,
                    CONNECTIONS,
                    2 * seconds,
                    rate=many.rate / 2,
                    seed=number,
                ),
                theirs,
            )
            if alone.failed or many.failed or half.failed:
                raise Unavailable(
                    f"The service refused {alone.failed + many.failed + half.failed} requests; its"
                    " log says why."
                )
            found["alone_p50_ms"].append(alone.percentile(50))
            found["added_ms"].append(
                float(np.median(np.array(alone.latencies_ms) - np.array(alone.service_ms)))
            )
            found["service_per_s"].append(many.rate)
            found["half_p99_ms"].append(half.percentile(99))
            found["in_turn_p99_ms"].append(
                in_turn_p99_ms(alone.latencies_ms, many.rate / 2, number)
            )
            found["generator_share"].append(many.generator_share)
    return found


def in_turn_p99_ms(
    alone_ms: Sequence[float], rate: float, seed: int, requests: int = 200_000
) -> float:
    """p99 of Poisson arrivals at `rate` a second that are served in turn, each for as long as some
    single request took (M/G/1, Lindley's recursion).

    Infinite where single requests cannot keep up with the arrivals.
    """
    if rate * float(np.mean(alone_ms)) >= 1000:
        return float("inf")
    draw = np.random.default_rng(seed)
    service = draw.choice(np.asarray(alone_ms), requests)
    gaps = draw.exponential(1000 / rate, requests)
    steps = np.concatenate([[0.0], np.cumsum(service[:-1] - gaps[1:])])
    waits = steps - np.minimum.accumulate(np.minimum(steps, 0.0))
    return float(np.percentile(waits + service, 99))


def offline(
    each: Subject, variant: str, texts: Sequence[str], seconds: float, cpus: set[int]
) -> float:
    """Texts a second of the engine alone: sorted by length, batches of 16, tokens ready."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.offline",
        str(each.artifact.directory),
        variant,
        str(seconds),
    ]
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cpus)), *command],
        input="\n".join(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def null_by_echo(text: str, rounds: int, seconds: float) -> dict[str, list[float]] | None:
    """In turns, of an echo, of a null model, and of a null model with keys and every limit on:
    requests a second, and the first two's p50 at one connection. None without wrk.
    """
    if shutil.which("wrk") is None:
        return None
    ours, theirs = halves()
    server_cpu = {min(ours)}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        (folder / "echo.py").write_text(ECHO)
        (folder / "keys").write_text("".join(f"key-{number}\n" for number in range(8)))
        write_null_artifact(folder / "null")
        body = json.dumps({"input": text}).replace("'", "\\'")
        (folder / "post.lua").write_text(WRK.format(body=body))
        (folder / "guarded.lua").write_text(
            WRK.format(body=body)
            + "".join(
                f'wrk.headers["{name}"] = "{value}"\n' for name, value in GUARDED_HEADERS.items()
            )
        )
        ports = [free_port() for _ in range(3)]
        echo = [
            sys.executable,
            "-m",
            "uvicorn",
            "--app-dir",
            str(folder),
            "echo:app",
            "--port",
            str(ports[0]),
            "--no-access-log",
            "--log-level",
            "warning",
        ]
        arms = {
            "echo": (echo, {}, "post.lua"),
            "null": (our_service(str(folder / "null"), port=ports[1]), {}, "post.lua"),
            "guarded": (
                our_service(str(folder / "null"), port=ports[2]),
                {"DRBERT_API_KEYS_FILE": str(folder / "keys"), **GUARDED},
                "guarded.lua",
            ),
        }
        running = {}
        for (name, (command, environment, _)), port in zip(arms.items(), ports, strict=True):
            running[name] = stack.enter_context(
                started(
                    name,
                    command,
                    port,
                    folder / f"{name}.log",
                    cpus=server_cpu,
                    environment=environment,
                )
            )
            running[name].pause()
        found: dict[str, list[float]] = {
            name: [] for name in (*arms, "echo_p50_ms", "null_p50_ms", "null_own_ms")
        }
        for number in range(rounds):
            for name in list(arms)[:: -1 if number % 2 else 1]:
                running[name].go_on()
                found[name].append(wrk(running[name], folder / arms[name][2], seconds, theirs))
                if f"{name}_p50_ms" in found:
                    alone = generator.run(
                        Load(
                            running[name].port,
                            "/classify",
                            [json.dumps({"input": text})],
                            1,
                            seconds,
                        ),
                        theirs,
                    )
                    found[f"{name}_p50_ms"].append(alone.percentile(50))
                    if alone.service_ms:
                        found["null_own_ms"].append(float(np.median(alone.service_ms)))
                running[name].pause()
    return found


def wrk(server: Process, script: Path, seconds: float, cpus: set[int]) -> float:
    """Requests a second, as wrk counts them."""
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{seconds:.0f}s",
        "-s",
        str(script),
        f"{server.url}/classify",
    ]
    said = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cpus)), *command],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "Non-2xx" in said:
        raise Unavailable(f"{server.name} refused wrk's requests: {said}")
    found = re.search(r"Requests/sec: +([\d.]+)", said)
    assert found is not None, said
    return float(found[1])


def compare(checkout: Path, texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    """Compare this checkout's service with another one's, in turns, each with artifacts that it
    made itself.
    """
    if shutil.which("wrk") is None:
        raise Unavailable("wrk is not installed (apt-get install wrk).")
    if not (checkout / "service" / "__main__.py").is_file():
        raise Unavailable(f"{checkout} is no checkout of this repository.")
    ours, theirs = halves()
    bodies = [json.dumps({"input": text}) for text in evenly(texts)]
    places = {"before": checkout, "now": Path(__file__).resolve().parent.parent}
    values: dict[str, list[float]] = {
        f"{what} {when}": []
        for what in ("null_per_s", "mini_per_s", "mini_p50_ms")
        for when in places
    }
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        (folder / "post.lua").write_text(
            WRK.format(body=json.dumps({"input": texts[0]}).replace("'", "\\'"))
        )
        running: dict[str, Process] = {}
        for when, place in places.items():
            environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(place)}
            _run_in(
                environment,
                "-c",
                "import sys; from pathlib import Path; from benchmarks.overhead import"
                " write_null_artifact; write_null_artifact(Path(sys.argv[1]))",
                str(folder / f"null {when}"),
            )
            _run_in(
                environment,
                "-m",
                "export",
                str(MINI.resolve()),
                str(folder / f"mini {when}"),
                "--variants",
                "cpu-fp32",
            )
            for what in ("null", "mini"):
                port, name = free_port(), f"{what} {when}"
                server = started(
                    name,
                    our_service(str(folder / name), port=port),
                    port,
                    folder / f"{name}.log",
                    cpus={min(ours)},
                    environment=environment,
                )
                running[name] = stack.enter_context(server)
                generator.run(
                    Load(port, "/classify", bodies, CONNECTIONS, seconds), theirs
                )  # every shape is met once before anything counts
                running[name].pause()
        for number in range(rounds):
            for when in list(places)[:: -1 if number % 2 else 1]:
                null, mini = running[f"null {when}"], running[f"mini {when}"]
                null.go_on()
                values[f"null_per_s {when}"].append(wrk(null, folder / "post.lua", seconds, theirs))
                null.pause()
                mini.go_on()
                alone = generator.run(Load(mini.port, "/classify", bodies, 1, seconds), theirs)
                values[f"mini_p50_ms {when}"].append(alone.percentile(50))
                values[f"mini_per_s {when}"].append(
                    generator.run(
                        Load(mini.port, "/classify", bodies, CONNECTIONS, seconds), theirs
                    ).rate
                )
                mini.pause()
    ratios = {
        what: np.array(values[f"{what} now"]) / np.array(values[f"{what} before"])
        for what in ("null_per_s", "mini_per_s", "mini_p50_ms")
    }
    rows = [
        [
            words,
            *(f"{np.median(values[f'{what} {when}']):,.{digits}f}" for when in places),
            spread(ratios[what]),
        ]
        for what, words, digits in (
            ("null_per_s", f"a model that does nothing, {CONNECTIONS} connections, requests/s", 0),
            ("mini_per_s", f"mini in fp32, {CONNECTIONS} connections, texts/s", 0),
            ("mini_p50_ms", "mini in fp32, one connection, p50 in ms", 3),
        )
    ]
    commits = [
        subprocess.run(
            ["git", "-C", str(place), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        for place in places.values()
    ]
    table = Table(
        f"{commits[0]} and {commits[1]}",
        ("", "before", "now", "now by before"),
        rows,
        "One processor for the server, another one for the generator; in turns.",
    )
    targets = [
        at_least(
            "a model that does nothing: requests/s, now by before",
            float(np.median(ratios["null_per_s"])),
            1.0,
        ),
        at_most(
            "mini: p50 of one connection, now by before",
            float(np.median(ratios["mini_p50_ms"])),
            1.05,
        ),
    ]
    return Findings(
        "overhead-before", "What has the service's own work come to cost?", [table], targets, values
    )


def _run_in(environment: Mapping[str, str], *arguments: str) -> None:
    """Run Python on a checkout's code, in its folder."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=environment["PYTHONPATH"],
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise Unavailable(
            f"python {' '.join(arguments[:2])} failed with {environment['PYTHONPATH']}:"
            f" {done.stderr[-400:]}"
        )


def write_null_artifact(folder: Path) -> None:
    """An artifact whose model multiplies one number by another for each label."""
    folder.mkdir()
    shutil.copy(MINI / "tokenizer.json", folder / "tokenizer.json")
    names = ("input_ids", "attention_mask", "token_type_ids")
    nodes = [
        helper.make_node("Slice", ["input_ids", "zero", "one", "axis"], ["first"], "/bert/Slice"),
        helper.make_node("Cast", ["first"], ["number"], "/bert/Cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["number", "weights"], ["logits"], "/classifier/MatMul"),
    ]
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "axis": np.array([1]),
        "weights": np.array([[0.0, 1.0]], np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "null",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in names
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        folder / "model.onnx",
    )
    variant = Variant(
        runtime="openvino",
        precision="f32",
        files=["model.onnx"],
        encoder_digest="0" * 64,
        head_digest="0" * 64,
        weight_bytes=8,
        parity=Parity(texts=0, max_probability_difference=0.0, tolerance=None, label_agreement=1.0),
        gate=Gate(status="passed", reason="does nothing"),
    )
    manifest = sealed(
        Manifest(
            schema_version=2,
            name="null",
            family="null",
            task="single_label",
            labels=["NEGATIVE", "POSITIVE"],
            takes_pairs=True,
            max_tokens=128,
            inputs=list(names),
            encoder_digest="0" * 64,
            head_digest="0" * 64,
            tokenizer_digest=sha256(folder / "tokenizer.json"),
            parameters=2,
            flops_per_token=0,
            padding_safe=True,
            dropped=None,
            kept_decoder_layers=0,
            variants={"cpu-fp32": variant},
            files={name: sha256(folder / name) for name in ("model.onnx", "tokenizer.json")},
            seal="",
            provenance={},
        )
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
