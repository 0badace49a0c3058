"""
Tests a running service with the newest official clients of other servers, and with a client that is
generated from the service's OpenAPI document.

    python -m tests.clients [NAME …]      (make clients)

Each client has a script, which prints the client's version and ends with 0 if all answers are
right. Each runs in an environment of its own in build/clients, which is updated each time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file

from benchmarks.harness.models_under_test import model_under_test
from benchmarks.harness.processes import running_server, service_command
from command import BadUsage, CommandError, Parser, Unavailable, finish
from proof.measuring.launch import free_port
from tests.factories import write_tagger

HERE = Path(__file__).parent
ENVIRONMENTS = Path("build/clients")
MODEL = "reviews"
JUDGE = "judge"
"""A second model, whose labels have the names of natural language inference."""
TAGGER = "tagger"
"""A third model, which labels tokens."""
RERANKER = Path("build/clients/reranker")
"""A cross-encoder, whose checkpoint the script of sentence-transformers reads, too."""
CHECKPOINT = Path("examples/checkpoints/drbert-mini-sst2")


@dataclass(frozen=True)
class Client:
    """A client and the script that tests it."""

    packages: tuple[str, ...]
    """Packages to install: from npm where the script ends in .mjs, else from PyPI."""
    script: str
    """File name of the script, which takes the service's URL and a model's name."""
    dialect: str = "native"
    """Dialect that /classify of the service uses."""
    asks_all_tasks: bool = False
    """Whether the service also has the models JUDGE and TAGGER."""
    reranks: bool = False
    """Whether the service also has the model RERANKER."""


CLIENTS = {
    "huggingface_hub": Client(
        ("huggingface_hub",), "huggingface_hub_client.py", asks_all_tasks=True
    ),
    "@huggingface/inference": Client(
        ("@huggingface/inference",), "huggingface_inference.mjs", asks_all_tasks=True
    ),
    "sentence-transformers": Client(
        ("torch==2.13.0", "sentence-transformers"), "cross_encoder.py", reranks=True
    ),
    "tritonclient": Client(("tritonclient[http]",), "triton_client.py"),
    "kserve": Client(("kserve",), "kserve_client.py"),
    "infinity_client": Client(("infinity_client",), "infinity_client_.py", "infinity"),
    "openapi-python-client": Client(("openapi-python-client", "ruff"), "openapi_client.py"),
    "openapi-typescript": Client(
        # openapi-typescript requires TypeScript 5.
        ("openapi-typescript", "openapi-fetch", "typescript@5"),
        "openapi_typescript.mjs",
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Run the clients of a command line; CommandError if one gets a wrong answer."""
    parser = Parser(
        prog="python -m tests.clients",
        description="Test a service with the newest official clients of other servers.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"clients to run (default: all of {', '.join(CLIENTS)})",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - CLIENTS.keys():
        raise BadUsage(
            f"There is no client {min(unknown)!r}; the clients are {', '.join(CLIENTS)}."
        )
    names = options.names or CLIENTS
    failed = [name for name in names if not run_client(name, CLIENTS[name])]
    if failed:
        raise CommandError(f"These clients got a wrong answer or none: {', '.join(failed)}.")
    return 0


def run_client(name: str, client: Client) -> bool:
    """Run a client's script against a service; return whether all answers were right."""
    command = [*_environment(name, client), str(HERE / client.script)]
    port, artifact = free_port(), str(model_under_test("mini").artifact.directory)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(
            name,
            service_command(
                f"{MODEL}={artifact}",
                *(_further_models(Path(folder)) if client.asks_all_tasks else []),
                *([f"{RERANKER.name}={_cross_encoder()}"] if client.reranks else []),
                port=port,
            ),
            port,
            Path(folder) / "log",
            environment={"DRBERT_CLASSIFY_DIALECT": client.dialect},
        ) as server,
    ):
        done = subprocess.run(
            [*command, server.url, MODEL], capture_output=True, text=True, check=False, timeout=120
        )
    print(f"{'right' if done.returncode == 0 else 'WRONG'}  {done.stdout.strip()}", flush=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0


def _further_models(folder: Path) -> list[str]:
    """Write the models for the other tasks, and return them as a command line names them."""
    tagger = write_tagger(folder / TAGGER)
    return [f"{JUDGE}={_renamed(folder / JUDGE)}", f"{TAGGER}={tagger.directory}"]


def _renamed(folder: Path) -> Path:
    """Write the example checkpoint with the labels of an entailment, and return its folder."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "not_entailment", "1": "entailment"}
    config["label2id"] = {"not_entailment": 0, "entailment": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _cross_encoder() -> Path:
    """Write the example checkpoint with one label, as a CrossEncoder, and return its folder."""
    shutil.rmtree(RERANKER, ignore_errors=True)
    shutil.copytree(CHECKPOINT, RERANKER)
    config = json.loads((RERANKER / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None}
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (RERANKER / "config.json").write_text(json.dumps(config))
    tensors = load_file(RERANKER / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][1:]
    save_file(tensors, RERANKER / "model.safetensors", {"format": "pt"})
    return RERANKER


def _environment(name: str, client: Client) -> list[str]:
    """Update the environment of a client; return the command that runs a script in it."""
    folder = ENVIRONMENTS / name.replace("/", "-").removeprefix("@")
    if client.script.endswith(".mjs"):
        if shutil.which("npm") is None:
            raise Unavailable("npm is not installed; apt-get install npm")
        folder.mkdir(parents=True, exist_ok=True)
        _run(
            [
                "npm",
                "install",
                "--silent",
                "--no-audit",
                "--no-fund",
                "--ignore-scripts",
                "--prefix",
                str(folder),
                *(name if "@" in name[1:] else f"{name}@latest" for name in client.packages),
            ]
        )
        # node resolves imports from the folder of the script.
        shutil.copy(HERE / client.script, folder)
        return [
            "node",
            "--input-type=module",
            "--eval",
            f"await import('{(folder / client.script).resolve()}')",
            "--",
        ]
    _run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin/python")
    _run(["sh", "install.sh", python, "--quiet", "--upgrade", "pip", *client.packages])
    return [python]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:4])} … failed: {done.stderr.strip()[-400:]}")


if __name__ == "__main__":
    finish(main)
