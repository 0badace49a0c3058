"""
The servers that are compared: what each needs, how it is started, what it is asked and what it
answers.

Every peer lives in a virtual environment of its own that this benchmark makes, and is configured as
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

from benchmarks.harness.models_under_test import FOLDER, Subject
from benchmarks.harness.processes import our_service
from command import Unavailable

APPS = Path(__file__).parent
UVICORN = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0")
TRANSFORMERS = ("torch==2.13.0", "transformers==4.57.6")

Answer = tuple[str, float]
"""The best label and its probability."""


@dataclass(frozen=True)
class Peer:
    name: str
    precision: str
    command: Callable[[Path, Subject, int], Sequence[str]]
    """From the interpreter of its environment, the model and a port."""
    body: Callable[[str], dict[str, Any]]
    answer: Callable[[Any], Answer]
    requirements: Sequence[str] = ()
    """Empty for our own service, which runs in this environment."""
    environment: Callable[[Subject], Mapping[str, str]] = field(default=lambda subject: {})
    ready: str = "/readyz"
    engine: str = ""
    """Torch, ONNX Runtime or OpenVINO."""


def ours(variant: str, precision: str) -> Peer:
    return Peer(
        f"DrBERT Serve {precision}",
        precision,
        lambda python, subject, port: our_service(
            str(subject.artifact.directory), "--variant", variant, port=port
        ),
        lambda text: {"input": text},
        lambda told: (told["data"][0]["label"], told["data"][0]["score"]),
        engine="openvino",
    )


def _uvicorn(app: str) -> Callable[[Path, Subject, int], Sequence[str]]:
    return lambda python, subject, port: [
        str(python),
        "-m",
        "uvicorn",
        "--app-dir",
        str(APPS),
        f"{app}:app",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-access-log",
        "--log-level",
        "warning",
    ]


def _checkpoint(**more: str) -> Callable[[Subject], Mapping[str, str]]:
    return lambda subject: (
        {"CHECKPOINT": str(subject.checkpoint), "TOKENIZERS_PARALLELISM": "false"} | more
    )


def _artifact(variant: str) -> Callable[[Subject], Mapping[str, str]]:
    return lambda subject: {
        "ARTIFACT": str(subject.artifact.directory),
        "VARIANT": variant,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _best(told: Any) -> Answer:
    """Of a list of labels and scores, or of a list of one such list."""
    scores = told[0] if isinstance(told[0], list) else told
    first = max(scores, key=lambda one: float(one["score"]))
    return first["label"], float(first["score"])


def _infinity(engine: str, precision: str = "fp32") -> Peer:
    def command(python: Path, subject: Subject, port: int) -> list[str]:
        # From within the model's folder: the ONNX engine finds its graph by a path that optimum
        # takes for a name.
        home = {
            "torch": subject.checkpoint.resolve,
            "optimum": lambda: with_onnx(subject, precision),
        }[engine]()
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
            # Its warm-up sends 514 tokens, which its ONNX engine does not cut and BERT does not
            # read.
            *(["--no-model-warmup"] if engine == "optimum" else []),
        ]

    return Peer(
        f"Infinity ({engine} engine{'' if precision == 'fp32' else f', {precision}'})",
        precision,
        command,
        lambda text: {"input": [text], "model": "m"},
        lambda told: _best(told["data"]),
        requirements=("infinity-emb[server,torch,optimum]==0.0.78", *TRANSFORMERS),
        environment=lambda subject: {
            # It keeps the graph that it has optimised there: one folder for each model.
            "HF_HOME": str((FOLDER / "hub" / f"{subject.name}-{precision}").resolve()),
            "HF_HUB_OFFLINE": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            "DO_NOT_TRACK": "1",
            # It has no option for ONNX Runtime's threads, which are as many as the host has
            # processors and get into each other's way on fewer.
            **(
                {"PYTHONPATH": str((APPS / "own_processors").resolve())}
                if engine == "optimum"
                else {}
            ),
        },
        ready="/health",
        engine={"torch": "torch", "optimum": "onnxruntime"}[engine],
    )


def with_onnx(subject: Subject, precision: str) -> Path:
    """The checkpoint with its graph beside it, as the hub has them and Infinity's ONNX engine wants
    them; of several it takes the quantised one.
    """
    home = (FOLDER / "with-onnx" / f"{subject.name}-{precision}").resolve()
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(subject.checkpoint, home, ignore=shutil.ignore_patterns("*.safetensors"))
    if precision == "fp32":
        shutil.copy(subject.artifact.directory / "model.onnx", home)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # As optimum's avx512_vnni configuration does it.
        quantize_dynamic(
            subject.artifact.directory / "model.onnx",
            home / "model_quantized.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return home


def peers(native: set[str]) -> list[Peer]:
    """Ours first, in every precision that the processor has instructions for, and OpenVINO without
    a batcher in the same.
    """
    variants = [
        ("cpu-fp32", "fp32"),
        *(
            (v, p)
            for v, p, own in (("cpu-bf16", "bf16", "bf16"), ("cpu-int8", "int8", "i8"))
            if own in native
        ),
    ]
    found = [ours(variant, precision) for variant, precision in variants]
    found += [_infinity("torch"), _infinity("optimum"), _infinity("optimum", "int8")]
    found.append(
        Peer(
            "FastAPI + transformers pipeline",
            "fp32",
            _uvicorn("app_pipeline"),
            lambda text: {"input": text},
            _best,
            requirements=(*TRANSFORMERS, *UVICORN),
            environment=_checkpoint(),
            engine="torch",
        )
    )
    found += [
        Peer(
            f"FastAPI + optimum ORTModel {precision}",
            precision,
            _uvicorn("app_optimum"),
            lambda text: {"input": text},
            _best,
            requirements=(
                *TRANSFORMERS,
                "optimum==2.1.0",
                "optimum-onnx[onnxruntime]==0.1.0",
                *UVICORN,
            ),
            environment=_checkpoint(PRECISION=precision),
            engine="onnxruntime",
        )
        for precision in ("fp32", "int8")
    ]
    found += [
        Peer(
            f"FastAPI + OpenVINO {precision}, no batching",
            precision,
            _uvicorn("app_openvino"),
            lambda text: {"input": text},
            _best,
            requirements=("openvino==2026.4.1", "tokenizers==0.22.2", "numpy>=2.4,<3", *UVICORN),
            environment=_artifact(variant),
            engine="openvino",
        )
        for variant, precision in variants
    ]
    found.append(
        Peer(
            "LitServe",
            "fp32",
            lambda python, subject, port: [str(python), str(APPS / "app_litserve.py"), str(port)],
            lambda text: {"input": text},
            _best,
            requirements=("litserve==0.2.19", *TRANSFORMERS),
            environment=_checkpoint(),
            engine="torch",
        )
    )
    return found


def interpreter(peer: Peer, folder: Path) -> Path:
    """The Python of the peer's environment, made the first time; Unavailable says what could not be
    installed.
    """
    if not peer.requirements:
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
