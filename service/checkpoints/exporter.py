"""
Runs `drbert-export` in a process of its own, which holds torch only as long as it exports.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from command import (
    BAD_INPUT,
    USAGE,
    BadInput,
    BadUsage,
    CommandError,
    Unavailable,
    exit_on_termination_signals,
    how_to_install,
)

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "onnx", "nncf", "safetensors", "scipy", "sentencepiece")
"""What export imports and the service does not."""
# The system ends the export with the thread that started it (prctl's PR_SET_PDEATHSIG), however
# this process ends.
CHILD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit(143)
from export.__main__ import run
run()
"""
STOP_WITHIN_S = 10.0
"""Seconds that an export has to remove its draft when it is interrupted."""


@dataclass(frozen=True)
class ExportOptions:
    """The options of `drbert-export` that `drbert-serve` has too."""

    task: str | None = None
    """Task of the models; None: by their configurations."""
    calibration: Path | None = None
    """Texts to calibrate cpu-int8 with; None: the bundled ones."""
    gate: Path | None = None
    """Texts of the accuracy gate of cpu-int8; None: no int8 is made."""

    def values(self) -> dict[str, str | bool | None]:
        """Return what decides about the artifact apart from the content of `files`."""
        return {"task": self.task, "gate": self.gate is not None}

    def files(self) -> list[Path]:
        """Return the files that are named."""
        return [path for path in (self.calibration, self.gate) if path is not None]

    def arguments(self) -> list[str]:
        """Return the options as arguments of `drbert-export`."""
        given = {"--task": self.task, "--calibration": self.calibration, "--gate": self.gate}
        return [
            part
            for option, value in given.items()
            if value is not None
            for part in (option, str(value))
        ]


def check_installed(checkpoint: Path) -> None:
    """Raise Unavailable, with the remedy, if a package that export needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(
            f"{checkpoint} is a checkpoint, and its export needs {missing[0]}, which is not"
            f" installed; {how_to_install('export')}. Or run `drbert-export {checkpoint} ARTIFACT`"
            " where it is installed, and serve ARTIFACT."
        )


def run_export(checkpoint: Path, artifact: Path, options: ExportOptions) -> None:
    """Export a checkpoint's folder to `artifact`, and log the export's output as it comes.

    Raises what the export ended with: BadUsage, BadInput or Unavailable. If this process is
    interrupted, so is the export, and it leaves nothing.
    """
    check_installed(checkpoint)
    command = [sys.executable, "-P", "-c", CHILD, str(os.getpid()), str(checkpoint), str(artifact)]
    command += options.arguments()
    started = time.monotonic()
    facts = {"checkpoint": str(checkpoint), "artifact": str(artifact)}
    log.info("exporting a checkpoint, which is needed once", extra=facts)
    last = ""
    with exit_on_termination_signals(), _process(command) as process:
        assert process.stdout is not None
        with process.stdout:
            for line in map(str.strip, process.stdout):
                if line:
                    last = line
                    log.info("export", extra={"output": line})
    if process.returncode:
        raise _failure(checkpoint, process.returncode, last)
    seconds = round(time.monotonic() - started, 1)
    log.info("exported a checkpoint", extra={**facts, "seconds": seconds})


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Yield the process, with its output and errors in one pipe; it has ended after the block."""
    root = str(Path(__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH")
    # The same code as this process runs, wherever it was started.
    path = os.pathsep.join([root, inherited] if inherited else [root])
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        encoding="utf-8",
        errors="replace",
    )
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _failure(checkpoint: Path, code: int, last: str) -> CommandError:
    """Return the error of an export that ended with `code`; `last` is its last line."""
    if code < 0:
        return Unavailable(
            f"The export of {checkpoint} was killed by {signal.Signals(-code).name}; if there was"
            " too little memory, export it on a larger machine with `drbert-export`."
        )
    # The line is "program: message".
    message = last.partition(": ")[2] or last
    kinds = {USAGE: BadUsage, BAD_INPUT: BadInput}
    return kinds.get(code, Unavailable)(f"{checkpoint} cannot be exported: {message}")
