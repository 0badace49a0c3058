"""
Asks a running service by the newest official clients of other servers, and by one that is generated
from our own description; each in an environment of its own.

    python -m tests.clients [NAME …]      make clients

What each client does is in the script of its name; it prints the client's version and ends with 0
if every answer was right. Environments lie in build/clients and are brought up to date each time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.models_under_test import subject
from benchmarks.harness.processes import free_port, our_service, started
from command import BadUsage, CommandError, Parser, Unavailable, finish

HERE = Path(__file__).parent
ENVIRONMENTS = Path("build/clients")
MODEL = "reviews"


@dataclass(frozen=True)
class Client:
    packages: tuple[str, ...]
    """Of PyPI, or of npm where the script ends in .mjs."""
    script: str
    dialect: str = "native"


CLIENTS = {
    "huggingface_hub": Client(("huggingface_hub",), "huggingface_hub_client.py"),
    "@huggingface/inference": Client(("@huggingface/inference",), "huggingface_inference.mjs"),
    "tritonclient": Client(("tritonclient[http]",), "triton_client.py"),
    "kserve": Client(("kserve",), "kserve_client.py"),
    "infinity_client": Client(("infinity_client",), "infinity_client_.py", "infinity"),
    "openapi-python-client": Client(("openapi-python-client", "ruff"), "openapi_client.py"),
}


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m tests.clients",
        description="Ask a service by the newest official clients of other servers.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"only these, of {', '.join(CLIENTS)}"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - CLIENTS.keys():
        raise BadUsage(f"There is no client {min(unknown)!r}; known are {', '.join(CLIENTS)}.")
    failed = [name for name in given.names or CLIENTS if not asks(name, CLIENTS[name])]
    if failed:
        raise CommandError(f"Answered wrongly, or not at all: {', '.join(failed)}.")
    return 0


def asks(name: str, client: Client) -> bool:
    """Whether everything that its script asks is answered as it expects."""
    command = [*_environment(name, client), str(HERE / client.script)]
    port, artifact = free_port(), str(subject("mini").artifact.directory)
    with (
        tempfile.TemporaryDirectory() as folder,
        started(
            name,
            our_service(f"{MODEL}={artifact}", port=port),
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


def _environment(name: str, client: Client) -> list[str]:
    """An up-to-date environment that holds the client, and what runs a script in it."""
    folder = ENVIRONMENTS / name.replace("/", "-").removeprefix("@")
    if client.script.endswith(".mjs"):
        if shutil.which("npm") is None:
            raise Unavailable("npm is not installed (apt-get install npm).")
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
                *(f"{one}@latest" for one in client.packages),
            ]
        )
        # An import is looked for beside the script.
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
