"""
What do HTTP, the queue and the answer add to the engine?

    python -m benchmarks overhead [--short] [--texts FILE] [--out FILE]
    python -m benchmarks overhead --before CHECKOUT    compare with another checkout of this
                                                       repository

The service is measured with one connection, saturated, at half load, and with a model that does
nothing. `wrk` (Debian: apt-get install wrk) sends the requests of the last, because a generator in
Python could not keep up.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from benchmarks.harness.generator import Load, LoadResult
from benchmarks.harness.models_under_test import MINI, ModelUnderTest, model_under_test
from benchmarks.harness.processes import (
    Server,
    running_server,
    service_command,
    split_cpus,
    uvicorn_command,
)
from benchmarks.harness.texts import TEXTS, mix_lengths, read_texts
from command import Parser, Unavailable
from proof.measuring.launch import free_port
from service.artifact import MANIFEST, Gate, Manifest, Parity, Variant, sha256, with_checksum

CONNECTIONS = 32
WRK = """
wrk.method = "POST"
wrk.body = '{body}'
wrk.headers["Content-Type"] = "application/json"
"""
# Every check that a request can go through.
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
MEASURES = (
    "engine_per_s",
    "service_per_s",
    "alone_p50_ms",
    "added_ms",
    "half_p99_ms",
    "in_turn_p99_ms",
    "generator_share",
)
"""What `engine_and_service` measures in every round."""


def main(arguments: Sequence[str]) -> int:
    """Measure the overhead, or compare it with another checkout, and print the tables."""
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
        help="file with the texts to send, one per line (default: bundled texts)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="only compare with another checkout of this repository, such as a git worktree",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    texts = read_texts(options.texts)
    rounds, seconds = (2, 4) if options.short else (5, 15)
    command = "python -m benchmarks overhead"
    if options.before is None:
        findings = measure(options.sizes, texts, rounds, seconds)
    else:
        findings = compare(options.before.resolve(), texts, 4 * rounds, min(seconds, 2))
        command += " --before CHECKOUT"
    print(markdown(findings))
    if options.out is not None:
        write(options.out, command, [findings])
    return 0


# The service and its engine.


def measure(sizes: Sequence[str], texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    """Return the overhead for each size, and that of a model that does nothing."""
    rows, targets, alone_ms = [], [], {}
    values: dict[str, object] = {}
    for size in sizes:
        model = model_under_test(size)
        variant = model.variants[-1]
        measured = engine_and_service(model, variant, texts, rounds, seconds)
        values[f"{size} {variant}"] = measured
        alone_ms[size] = float(np.median(measured["alone_p50_ms"]))
        rows.append([size, variant, *_service_cells(measured)])
        targets += _service_targets(size, measured)
    tables = [_service_table(rows)]
    null = null_by_echo(texts[0], rounds, min(seconds, 5.0))
    if null is None:
        absent = "wrk is not installed (apt-get install wrk)"
        targets.append(Target("a model that does nothing, by a bare echo", "≥ 0.50", absent, None))
    else:
        values["null"] = null
        tables.append(_null_table(null))
        targets += _null_targets(null, alone_ms)
    return Findings(
        "overhead",
        "What do HTTP, the queue and the answer add to the engine?",
        tables,
        targets,
        values,
    )


class ServiceRatios(NamedTuple):
    """What the service makes of its engine, by round."""

    delivered: np.ndarray
    """Texts per second of the saturated service by those of the engine alone."""
    tail: np.ndarray
    """p99 at half load by the p50 of single requests."""
    in_turn: np.ndarray
    """The same for a queue without batches (simulated)."""


def _ratios(measured: Mapping[str, Sequence[float]]) -> ServiceRatios:
    alone = np.array(measured["alone_p50_ms"])
    return ServiceRatios(
        np.array(measured["service_per_s"]) / np.array(measured["engine_per_s"]),
        np.array(measured["half_p99_ms"]) / alone,
        np.array(measured["in_turn_p99_ms"]) / alone,
    )


def _service_cells(measured: Mapping[str, Sequence[float]]) -> list[str]:
    ratios = _ratios(measured)
    keeps_up = np.isfinite(ratios.in_turn).all()
    return [
        f"{np.median(measured['alone_p50_ms']):.2f}",
        spread(measured["added_ms"]),
        f"{np.median(measured['engine_per_s']):.0f}",
        f"{np.median(measured['service_per_s']):.0f}",
        spread(ratios.delivered),
        spread(ratios.tail, 1),
        spread(ratios.in_turn, 1) if keeps_up else "does not keep up",
        f"{np.median(measured['generator_share']):.0%}",
    ]


def _service_targets(size: str, measured: Mapping[str, Sequence[float]]) -> list[Target]:
    ratios = _ratios(measured)
    return [
        at_most(
            f"{size}: p50 at one connection beyond tokenising and inference",
            float(np.median(measured["added_ms"])),
            0.5,
            " ms",
        ),
        at_least(
            f"{size}: the engine's own rate that reaches {CONNECTIONS} connections",
            float(np.median(ratios.delivered)),
            0.8,
        ),
        at_most(
            f"{size}: p99 at half load by the time of one request alone",
            float(np.median(ratios.tail)),
            3.0,
        ),
    ]


def _service_table(rows: Sequence[Sequence[str]]) -> Table:
    columns = (
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
    )
    note = (
        "Engine alone: the texts sorted by length, in batches of 16, in a process of its own. Half"
        f" load: Poisson arrivals at half the rate of {CONNECTIONS} connections, each request timed"
        " from when it was due. Served one by one: a queue without batches with the same arrivals"
        " and the times of single requests (simulated)."
    )
    return Table("The service over its engine", columns, rows, note)


def engine_and_service(
    model: ModelUnderTest, variant: str, texts: Sequence[str], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Measure the engine alone and the service, in turns; return a value per round for MEASURES.

    The engine runs in a process of its own. The service is measured with one connection, with many,
    and at half load.
    """
    server_cpus, generator_cpus = split_cpus()
    bodies = [json.dumps({"input": text}) for text in mix_lengths(texts)]
    values: dict[str, list[float]] = {key: [] for key in MEASURES}
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(
            model.name,
            service_command(str(model.artifact.directory), "--variant", variant, port=port),
            port,
            Path(folder) / "log",
            cpus=server_cpus,
        ) as server,
    ):
        single = Load(port, "/classify", bodies, 1, seconds)
        saturating = Load(port, "/classify", bodies, CONNECTIONS, seconds)
        # Every shape runs once before anything counts.
        generator.run(saturating, generator_cpus)
        for number in range(rounds):
            server.pause()
            engine_per_s = offline(model, variant, texts, seconds, server_cpus)
            server.resume()
            alone = generator.run(single, generator_cpus)
            many = generator.run(saturating, generator_cpus)
            half_rate = many.rate / 2
            half_load = Load(
                port,
                "/classify",
                bodies,
                CONNECTIONS,
                2 * seconds,
                rate=half_rate,
                seed=number,
            )
            half = generator.run(half_load, generator_cpus)
            _check_answered(alone, many, half)
            round_values = {
                "engine_per_s": engine_per_s,
                "service_per_s": many.rate,
                "alone_p50_ms": alone.percentile(50),
                "added_ms": float(
                    np.median(np.array(alone.latencies_ms) - np.array(alone.service_ms))
                ),
                "half_p99_ms": half.percentile(99),
                "in_turn_p99_ms": in_turn_p99_ms(alone.latencies_ms, half_rate, number),
                "generator_share": many.generator_share,
            }
            for key, value in round_values.items():
                values[key].append(value)
    return values


def _check_answered(*results: LoadResult) -> None:
    failed = sum(result.failed for result in results)
    if failed:
        raise Unavailable(f"The service refused {failed} requests; its log says why.")


def in_turn_p99_ms(
    alone_ms: Sequence[float], rate: float, seed: int, requests: int = 200_000
) -> float:
    """Return the p99 in milliseconds of a queue that serves one request after the other.

    Arrivals are Poisson at `rate` per second; each request takes as long as one drawn from
    `alone_ms` (M/G/1, Lindley's recursion). It is infinite if such a queue cannot keep up.
    """
    if rate * float(np.mean(alone_ms)) >= 1000:
        return float("inf")
    rng = np.random.default_rng(seed)
    service = rng.choice(np.asarray(alone_ms), requests)
    gaps = rng.exponential(1000 / rate, requests)
    steps = np.concatenate([[0.0], np.cumsum(service[:-1] - gaps[1:])])
    waits = steps - np.minimum.accumulate(np.minimum(steps, 0.0))
    return float(np.percentile(waits + service, 99))


def offline(
    model: ModelUnderTest, variant: str, texts: Sequence[str], seconds: float, cpus: set[int]
) -> float:
    """Return the texts per second of the engine alone (benchmarks/offline.py)."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.offline",
        str(model.artifact.directory),
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


# A model that does nothing, and an echo.


def _null_table(null: Mapping[str, Sequence[float]]) -> Table:
    echo, nothing, guarded = (np.array(null[name]) for name in ("echo", "null", "guarded"))
    columns = (
        "",
        "requests/s",
        "by the echo",
        "one connection: p50, ms",
        "of it tokens and inference, ms",
    )
    rows = [
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
    ]
    note = (
        f"wrk, {CONNECTIONS} connections, one processor for the server. One connection is by the"
        " generator of the other benchmarks; its own time and two wake-ups of an idle processor are"
        " in the echo's p50 too. The null model still tokenises, batches and answers."
    )
    return Table("A model that does nothing", columns, rows, note)


def _null_targets(
    null: Mapping[str, Sequence[float]], alone_ms: Mapping[str, float]
) -> list[Target]:
    """Return the targets of the null model; `alone_ms` is a request's time by model size."""
    echo, nothing, guarded = (np.array(null[name]) for name in ("echo", "null", "guarded"))
    # Processor time of the checks, which is compared with a whole request of a real model.
    guards_ms = float(np.median(1000 * (1 / guarded - 1 / nothing)))
    targets = [
        at_least(
            "a model that does nothing, by a bare echo", float(np.median(nothing / echo)), 0.5
        ),
        at_least(
            "the same with keys, CORS, a deadline and every limit, by without",
            float(np.median(guarded / nothing)),
            0.95,
        ),
    ]
    for size, request_ms in alone_ms.items():
        name = f"keys, CORS, a deadline and every limit, of a request to {size} alone"
        targets.append(at_most(name, guards_ms / request_ms, 0.05))
    return targets


@dataclass(frozen=True)
class NullArm:
    """A server that is compared with the echo, and the script with its requests."""

    command: Sequence[str]
    port: int
    script: Path
    environment: Mapping[str, str]


def null_by_echo(text: str, rounds: int, seconds: float) -> dict[str, list[float]] | None:
    """Measure an echo, a null model, and a null model with every check, in turns.

    Returns requests per second by arm (`echo`, `null`, `guarded`), the first two's p50 at one
    connection (`…_p50_ms`), and the null model's own time (`null_own_ms`); None without wrk.
    """
    if shutil.which("wrk") is None:
        return None
    server_cpus, generator_cpus = split_cpus()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        arms = _null_arms(folder, text)
        servers = {}
        for name, arm in arms.items():
            servers[name] = stack.enter_context(
                running_server(
                    name,
                    arm.command,
                    arm.port,
                    folder / f"{name}.log",
                    cpus={min(server_cpus)},
                    environment=arm.environment,
                )
            )
            servers[name].pause()
        extra = ("echo_p50_ms", "null_p50_ms", "null_own_ms")
        values: dict[str, list[float]] = {name: [] for name in (*arms, *extra)}
        for number in range(rounds):
            for name in list(arms)[:: -1 if number % 2 else 1]:
                server = servers[name]
                with server.unpaused():
                    values[name].append(wrk(server, arms[name].script, seconds, generator_cpus))
                    if f"{name}_p50_ms" in values:
                        bodies = [json.dumps({"input": text})]
                        load = Load(server.port, "/classify", bodies, 1, seconds)
                        alone = generator.run(load, generator_cpus)
                        values[f"{name}_p50_ms"].append(alone.percentile(50))
                        if alone.service_ms:
                            values["null_own_ms"].append(float(np.median(alone.service_ms)))
    return values


def _null_arms(folder: Path, text: str) -> dict[str, NullArm]:
    """Write the files of the three arms to `folder` and return the arms."""
    (folder / "echo.py").write_text(ECHO)
    (folder / "keys").write_text("".join(f"key-{number}\n" for number in range(8)))
    write_null_artifact(folder / "null")
    plain, guarded = folder / "post.lua", folder / "guarded.lua"
    _write_wrk_script(plain, text)
    _write_wrk_script(guarded, text, GUARDED_HEADERS)
    echo_port, null_port, guarded_port = (free_port() for _ in range(3))
    echo = uvicorn_command("echo:app", folder, echo_port)
    null = str(folder / "null")
    environment = {"DRBERT_API_KEYS_FILE": str(folder / "keys"), **GUARDED}
    return {
        "echo": NullArm(echo, echo_port, plain, {}),
        "null": NullArm(service_command(null, port=null_port), null_port, plain, {}),
        "guarded": NullArm(
            service_command(null, port=guarded_port), guarded_port, guarded, environment
        ),
    }


def _write_wrk_script(path: Path, text: str, headers: Mapping[str, str] | None = None) -> None:
    """Write a script with which wrk posts one text."""
    script = WRK.format(body=json.dumps({"input": text}).replace("'", "\\'"))
    for name, value in (headers or {}).items():
        script += f'wrk.headers["{name}"] = "{value}"\n'
    path.write_text(script)


def wrk(server: Server, script: Path, seconds: float, cpus: set[int]) -> float:
    """Return the requests per second that wrk counts; raise Unavailable if one was refused."""
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{seconds:.0f}s",
        "-s",
        str(script),
        f"{server.url}/classify",
    ]
    output = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cpus)), *command],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "Non-2xx" in output:
        raise Unavailable(f"{server.name} refused wrk's requests: {output}")
    match = re.search(r"Requests/sec: +([\d.]+)", output)
    assert match is not None, output
    return float(match[1])


# This checkout and another one.

COMPARED = {
    "null_per_s": (f"a model that does nothing, {CONNECTIONS} connections, requests/s", 0),
    "mini_per_s": (f"mini in fp32, {CONNECTIONS} connections, texts/s", 0),
    "mini_p50_ms": ("mini in fp32, one connection, p50 in ms", 3),
}
"""Measures of a comparison, each with its name in the table and its decimals."""


def compare(checkout: Path, texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    """Compare this checkout's service with that of `checkout`, in turns.

    Each serves artifacts that its own code has written.
    """
    if shutil.which("wrk") is None:
        raise Unavailable("wrk is not installed; install it with `apt-get install wrk`.")
    if not (checkout / "service" / "__main__.py").is_file():
        raise Unavailable(f"{checkout} is not a checkout of this repository.")
    checkouts = {"before": checkout, "now": Path(__file__).resolve().parent.parent}
    generator_cpus = split_cpus()[1]
    bodies = [json.dumps({"input": text}) for text in mix_lengths(texts)]
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        script = folder / "post.lua"
        _write_wrk_script(script, texts[0])
        servers: dict[str, Server] = {}
        for when, place in checkouts.items():
            for server in _serve_checkout(stack, folder, when, place):
                servers[server.name] = server
                # Every shape runs once before anything counts.
                load = Load(server.port, "/classify", bodies, CONNECTIONS, seconds)
                generator.run(load, generator_cpus)
                server.pause()
        for number in range(rounds):
            for when in list(checkouts)[:: -1 if number % 2 else 1]:
                null, mini = servers[f"null {when}"], servers[f"mini {when}"]
                with null.unpaused():
                    null_per_s = wrk(null, script, seconds, generator_cpus)
                values.setdefault(f"null_per_s {when}", []).append(null_per_s)
                with mini.unpaused():
                    single = Load(mini.port, "/classify", bodies, 1, seconds)
                    alone = generator.run(single, generator_cpus)
                    saturating = Load(mini.port, "/classify", bodies, CONNECTIONS, seconds)
                    many = generator.run(saturating, generator_cpus)
                values.setdefault(f"mini_p50_ms {when}", []).append(alone.percentile(50))
                values.setdefault(f"mini_per_s {when}", []).append(many.rate)
    return _comparison(checkouts, values)


def _serve_checkout(
    stack: contextlib.ExitStack, folder: Path, when: str, checkout: Path
) -> Iterator[Server]:
    """Start a checkout's service with the null model and with the mini, one after the other."""
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(checkout)}
    code = (
        "import sys; from pathlib import Path; from benchmarks.overhead import write_null_artifact;"
        " write_null_artifact(Path(sys.argv[1]))"
    )
    _run_in(environment, "-c", code, str(folder / f"null {when}"))
    mini = [str(MINI.resolve()), str(folder / f"mini {when}")]
    _run_in(environment, "-m", "export", *mini, "--variants", "cpu-fp32")
    for name in (f"null {when}", f"mini {when}"):
        port = free_port()
        yield stack.enter_context(
            running_server(
                name,
                service_command(str(folder / name), port=port),
                port,
                folder / f"{name}.log",
                cpus={min(split_cpus()[0])},
                environment=environment,
            )
        )


def _comparison(checkouts: Mapping[str, Path], values: dict[str, list[float]]) -> Findings:
    """Return the findings of a comparison; `values` has a list by measure and checkout."""
    ratios = {
        measure: np.array(values[f"{measure} now"]) / np.array(values[f"{measure} before"])
        for measure in COMPARED
    }
    rows = []
    for measure, (name, digits) in COMPARED.items():
        medians = [np.median(values[f"{measure} {when}"]) for when in checkouts]
        cells = [f"{median:,.{digits}f}" for median in medians]
        rows.append([name, *cells, spread(ratios[measure])])
    before, now = (_commit(checkout) for checkout in checkouts.values())
    table = Table(
        f"{before} and {now}",
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
    question = "How has the cost of the service's own work changed?"
    return Findings("overhead-before", question, [table], targets, values)


def _commit(checkout: Path) -> str:
    """Return the short hash of a checkout's commit."""
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


def _run_in(environment: Mapping[str, str], *arguments: str) -> None:
    """Run Python with a checkout's code, in its folder."""
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
    """Write an artifact whose model multiplies one number by another for each label.

    `overhead --before` runs it in other checkouts, so it keeps its name and place.
    """
    folder.mkdir()
    shutil.copy(MINI / "tokenizer.json", folder / "tokenizer.json")
    names = ("input_ids", "attention_mask", "token_type_ids")
    _write_null_graph(folder / "model.onnx", names)
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
    manifest = with_checksum(
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
            padding_invariant=True,
            dropped=None,
            kept_decoder_layers=0,
            variants={"cpu-fp32": variant},
            files={name: sha256(folder / name) for name in ("model.onnx", "tokenizer.json")},
            checksum="",
            provenance={},
        )
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def _write_null_graph(path: Path, names: Sequence[str]) -> None:
    """Write a graph with these inputs whose logits are the first token's id times (0, 1)."""
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
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in names
    ]
    graph = helper.make_graph(
        nodes,
        "null",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
