"""
A process that runs batches of one artifact, and a counter of its instructions.

With hardware counters it runs as in production. With Valgrind an emulated processor runs it, about
a thousand times slower; the counts do not depend on what else the machine does.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from command import CommandError, Unavailable
from proof.work.counters import Counter, unavailable_reason

Method = Literal["counters", "valgrind"]
MARK = "ctermid"
"""The C function that a workload calls before and after its runs, and nowhere else."""
REMEDY = "install Valgrind with `apt-get install valgrind`"
VGDB_TIMEOUT_S = 60.0
TAIL_BYTES = 4096
"""End of a profile that is read; its total stands there."""


@dataclass(frozen=True)
class Loading:
    """What a workload is asked to load."""

    artifact: Path
    variant: str
    runtime: str
    unquantized_precision: str | None = None
    """Lowest precision for what an int8 graph does not quantize; None: the service's choice."""


class WorkloadFailed(CommandError):
    """The process that runs the batches ended; the message is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def choose_method(requested: str) -> Method:
    """Return how instructions are counted here; Unavailable, with the remedy, if they cannot be."""
    reason = unavailable_reason() if requested in ("auto", "counters") else None
    if requested in ("auto", "counters") and reason is None:
        return "counters"
    if requested == "counters":
        raise Unavailable(f"{reason}; pass --method valgrind.")
    if shutil.which("valgrind") is None:
        lacking = f"{reason}, and no Valgrind" if reason else "there is no Valgrind"
        raise Unavailable(f"Instructions cannot be counted: {lacking}; {REMEDY}.")
    return "valgrind"


def method_version(method: Method) -> str:
    """Return the version of Valgrind, or of the kernel that offers the counters."""
    if method == "counters":
        return f"Linux {os.uname().release}"
    done = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Workload:
    """A running process with one loaded artifact; without a method it counts nothing."""

    def __init__(
        self, loading: Loading, method: Method | None, profiles: Path, errors: IO[str]
    ) -> None:
        """Start the process.

        `profiles` is an empty folder for Valgrind's files; `errors` takes its standard error.
        """
        self._loading = loading
        self._method = method
        self._profiles = profiles
        self._errors = errors
        self._runs = 0
        self._counter: Counter | None = None
        self.loaded: dict[str, Any] = {}
        """What was loaded, as the process describes it; empty until then."""
        self._process = self._start(loading, counts_at_start=False)

    def wait_until_loaded(self) -> None:
        """Return as soon as the artifact is loaded and the counter counts.

        Raise WorkloadFailed if the artifact cannot be loaded.
        """
        self.loaded = self._read_answer()
        if self._method == "counters":
            self._counter = Counter(self._process.pid)
        elif self._method == "valgrind" and not _start_counting(self._process.pid):
            self._end()
            self._process = self._start(self._loading, counts_at_start=True)
            self.loaded = self._read_answer()

    def _start(self, loading: Loading, counts_at_start: bool) -> subprocess.Popen[str]:
        wrapper = self._wrapper(counts_at_start) if self._method == "valgrind" else []
        return subprocess.Popen(
            [*wrapper, *_command(loading)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # One seed of hashes and one thread of the arrays' library: the same instructions again.
            env=os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        )

    def _wrapper(self, counts_at_start: bool) -> list[str]:
        return [
            "valgrind",
            "--tool=callgrind",
            # Checking generated code before each execution takes most of the time. Generated code
            # is not changed here; the logits are compared with those of a plain process.
            "--smc-check=none",
            f"--instr-atstart={'yes' if counts_at_start else 'no'}",
            f"--dump-before={MARK}",
            "--dump-line=no",
            f"--callgrind-out-file={self._profiles / 'profile'}",
        ]

    def prepare(self, text: str, max_tokens: int | None, copies: int) -> dict[str, Any]:
        """Make a batch of copies of a text and run it once; return its tokens and logits."""
        return self._ask({"prepare": {"text": text, "max_tokens": max_tokens, "copies": copies}})

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def run(self, repetitions: int) -> None:
        """Run the batch so many times."""
        self._ask({"run": repetitions})

    def count(self, repetitions: int) -> int:
        """Return the instructions of so many runs of the batch, those of asking for it included."""
        before = self._counter.read() if self._counter else 0
        self.run(repetitions)
        if self._counter:
            return self._counter.read() - before
        # Each run has two marks, and a profile ends at each: the second one covers the run.
        self._runs += 1
        first, second = (self._profiles / f"profile.{2 * self._runs - i}" for i in (1, 0))
        total = _read_total(second)
        first.unlink()
        second.unlink()
        return total

    def kill(self) -> None:
        """End the process from another thread; whatever waits for an answer raises."""
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        if self._counter:
            self._counter.close()
        self._end()

    def _end(self) -> None:
        # Its result is not needed, and under Valgrind an orderly end takes seconds.
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read_answer()

    def _read_answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> WorkloadFailed:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [
            line for line in self._errors.read().splitlines() if line and not line.startswith("==")
        ]
        message = lines[-1] if lines else f"it ended with {code} and no message"
        return WorkloadFailed(
            message.removeprefix("service.workload: "), code if 64 <= code < 128 else 70
        )


def _start_counting(pid: int) -> bool:
    """Let a process under Valgrind count from now on; return whether it does.

    Valgrind loads an artifact in a third of the time while it does not count. Where one process
    must not trace another, Valgrind cannot be reached.
    """
    try:
        subprocess.run(
            ["vgdb", f"--pid={pid}", "instrumentation", "on"],
            capture_output=True,
            check=True,
            timeout=VGDB_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _command(loading: Loading) -> list[str]:
    command = [sys.executable, "-P", "-m", "service.workload", str(loading.artifact)]
    command += ["--variant", loading.variant, "--runtime", loading.runtime]
    if loading.unquantized_precision is not None:
        command += ["--unquantized-precision", loading.unquantized_precision]
    return command


def _read_total(profile: Path) -> int:
    """Return the instructions of a callgrind profile."""
    with profile.open("rb") as file:
        file.seek(max(0, profile.stat().st_size - TAIL_BYTES))
        tail = file.read().decode(errors="replace")
    total = re.search(r"^totals: (\d+)$", tail, re.MULTILINE)
    if total is None:
        raise Unavailable(f"{profile} has no total; use another version of Valgrind.")
    return int(total.group(1))


@contextlib.contextmanager
def running(loading: Loading, method: Method | None) -> Iterator[Workload]:
    """Run a workload, and end it however the block ends."""
    with (
        tempfile.TemporaryDirectory(prefix="drbert-work-") as folder,
        (Path(folder) / "stderr.txt").open("w+", encoding="utf-8") as errors,
    ):
        workload = Workload(loading, method, Path(folder), errors)
        try:
            workload.wait_until_loaded()
            yield workload
        finally:
            workload.close()
