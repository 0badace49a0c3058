"""
The servers that are compared: their packages, commands, requests and answers.

Every peer runs in a virtual environment of its own that this benchmark creates. It is configured as
its documentation advises.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.models_under_test import FOLDER, ModelUnderTest
from benchmarks.harness.processes import service_command, uvicorn_command
from command import Unavailable

APPS = Path(__file__).parent
UVICORN = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0")
TRANSFORMERS = ("torch==2.13.0", "transformers==4.57.6")

Answer = tuple[str, float]
"""The best label and its probability."""

Command = Callable[[Path, ModelUnderTest, int], Sequence[str]]
"""Returns a server's command from its environment's interpreter, the model and a port."""

Environment = Callable[[ModelUnderTest], Mapping[str, str]]
"""Returns the environment variables of a server for a model."""


@dataclass(frozen=True)
class Peer:
    """A server that serves the same classifier."""

    name: str
    precision: str
    command: Command
    body: Callable[[Any], dict[str, Any]]
    """Returns the request body for a text; of a reranker, for a query with its documents."""
    answer: Callable[[Any], Any]
    """Returns the best label and its probability, an Answer, from a response body; of a reranker,
    the score of each document.
    """
    requirements: Sequence[str] = ()
    """Packages to install; empty for our own service, which runs in this environment."""
    environment: Environment = field(default=lambda model: {})
    ready: str = "/readyz"
    """Path that answers with 200 once the server is ready."""
    path: str = "/classify"
    """Path of the requests."""
    engine: str = ""
    """Inference engine: torch, onnxruntime or openvino."""

    @property
    def is_ours(self) -> bool:
        """Whether it is our own service."""
        return not self.requirements


def ours(variant: str, precision: str) -> Peer:
    """Return our service with a variant, whose precision the tables name."""
    return Peer(
        f"DrBERT Serve {precision}",
        precision,
        lambda python, model, port: service_command(
            str(model.artifact.directory), "--variant", variant, port=port
        ),
        _input,
        lambda response: (response["data"][0]["label"], response["data"][0]["score"]),
        engine="openvino",
    )


def _input(text: str) -> dict[str, Any]:
    return {"input": text}


def uvicorn_app(app: str) -> Command:
    """Return the command of a module of this folder with an ASGI application."""
    return lambda python, model, port: uvicorn_command(f"{app}:app", APPS, port, python)


def checkpoint_variables(**more: str) -> Environment:
    """Return the variables of a server that reads the checkpoint, and `more`."""
    return lambda model: (
        {"CHECKPOINT": str(model.checkpoint), "TOKENIZERS_PARALLELISM": "false"} | more
    )


def _artifact(variant: str) -> Environment:
    return lambda model: {
        "ARTIFACT": str(model.artifact.directory),
        "VARIANT": variant,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _best(response: Any) -> Answer:
    """Return the best answer of a list of labels and scores, or of a list of one such list."""
    scores = response[0] if isinstance(response[0], list) else response
    best = max(scores, key=lambda entry: float(entry["score"]))
    return best["label"], float(best["score"])


def infinity(engine: str, precision: str = "fp32") -> Peer:
    """Return Infinity with one of its engines."""

    def command(python: Path, model: ModelUnderTest, port: int) -> list[str]:
        # It starts in the model's folder: optimum would take a path to the ONNX engine's graph for
        # the name of a model.
        home = (
            write_onnx_checkpoint(model, precision)
            if engine == "optimum"
            else model.checkpoint.resolve()
        )
        return [
            "env",
            "--chdir",
            str(home),
            str(python.parent / "infinity_emb"),
            "v2",
            "--model-id",
            ".",
            "--served-model-name",
            "m",
            "--engine",
            engine,
            "--device",
            "cpu",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--log-level",
            "warning",
            # Its warm-up sends 514 tokens. Its ONNX engine does not truncate them, and BERT cannot
            # read as many.
            *(["--no-model-warmup"] if engine == "optimum" else []),
        ]

    def environment(model: ModelUnderTest) -> dict[str, str]:
        variables = {
            # It stores its optimised graph there: one folder for each model.
            "HF_HOME": str((FOLDER / "hub" / f"{model.name}-{precision}").resolve()),
            "HF_HUB_OFFLINE": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            "DO_NOT_TRACK": "1",
        }
        if engine == "optimum":
            # It has no option for ONNX Runtime's threads. By default there is one for each
            # processor of the host, and on fewer processors they slow each other down.
            variables["PYTHONPATH"] = str((APPS / "own_processors").resolve())
        return variables

    return Peer(
        f"Infinity ({engine} engine{'' if precision == 'fp32' else f', {precision}'})",
        precision,
        command,
        lambda text: {"input": [text], "model": "m"},
        lambda response: _best(response["data"]),
        requirements=("infinity-emb[server,torch,optimum]==0.0.78", *TRANSFORMERS),
        environment=environment,
        ready="/health",
        engine={"torch": "torch", "optimum": "onnxruntime"}[engine],
    )


def write_onnx_checkpoint(model: ModelUnderTest, precision: str) -> Path:
    """Write the checkpoint with its ONNX graph, as on the Hugging Face hub; return the folder.

    Infinity's ONNX engine reads that form; of several graphs it takes the quantised one.
    """
    home = (FOLDER / "with-onnx" / f"{model.name}-{precision}").resolve()
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(model.checkpoint, home, ignore=shutil.ignore_patterns("*.safetensors"))
    if precision == "fp32":
        shutil.copy(model.artifact.directory / "model.onnx", home)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # As optimum's avx512_vnni configuration does it.
        quantize_dynamic(
            model.artifact.directory / "model.onnx",
            home / "model_quantized.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return home


def peers(native: set[str]) -> list[Peer]:
    """Return all peers, ours first.

    Ours and OpenVINO without a batcher are in every precision of `native`, those that the processor
    has instructions for.
    """
    variants = [("cpu-fp32", "fp32")]
    if "bf16" in native:
        variants.append(("cpu-bf16", "bf16"))
    if "i8" in native:
        variants.append(("cpu-int8", "int8"))
    return [
        *(ours(variant, precision) for variant, precision in variants),
        infinity("torch"),
        infinity("optimum"),
        infinity("optimum", "int8"),
        Peer(
            "FastAPI + transformers pipeline",
            "fp32",
            uvicorn_app("app_pipeline"),
            _input,
            _best,
            requirements=(*TRANSFORMERS, *UVICORN),
            environment=checkpoint_variables(),
            engine="torch",
        ),
        _optimum("fp32"),
        _optimum("int8"),
        *(_plain_openvino(variant, precision) for variant, precision in variants),
        Peer(
            "LitServe",
            "fp32",
            lambda python, model, port: [str(python), str(APPS / "app_litserve.py"), str(port)],
            _input,
            _best,
            requirements=("litserve==0.2.19", *TRANSFORMERS),
            environment=checkpoint_variables(),
            engine="torch",
        ),
    ]


def _optimum(precision: str) -> Peer:
    return Peer(
        f"FastAPI + optimum ORTModel {precision}",
        precision,
        uvicorn_app("app_optimum"),
        _input,
        _best,
        requirements=(
            *TRANSFORMERS,
            "optimum==2.1.0",
            "optimum-onnx[onnxruntime]==0.1.0",
            *UVICORN,
        ),
        environment=checkpoint_variables(PRECISION=precision),
        engine="onnxruntime",
    )


def _plain_openvino(variant: str, precision: str) -> Peer:
    return Peer(
        f"FastAPI + OpenVINO {precision}, no batching",
        precision,
        uvicorn_app("app_openvino"),
        _input,
        _best,
        requirements=("openvino==2026.4.1", "tokenizers==0.22.2", "numpy>=2.4,<3", *UVICORN),
        environment=_artifact(variant),
        engine="openvino",
    )


def interpreter(peer: Peer, folder: Path) -> Path:
    """Return the Python of the peer's environment below `folder`, created if it is not there yet.

    Raises Unavailable with pip's last line if a package cannot be installed.
    """
    if peer.is_ours:
        return Path(sys.executable)
    digest = hashlib.sha256(json.dumps(sorted(peer.requirements)).encode()).hexdigest()[:12]
    home = folder / digest
    if not (home / "made").is_file():
        shutil.rmtree(home, ignore_errors=True)
        print(f"{peer.name}: installing {', '.join(peer.requirements)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        done = subprocess.run(
            [str(home / "bin/python"), "-m", "pip", "install", "--quiet", *peer.requirements],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(
                f"{peer.name} cannot be installed: {done.stderr.strip().splitlines()[-1]}"
            )
        (home / "made").write_text("\n".join(peer.requirements) + "\n")
    return home.resolve() / "bin/python"
