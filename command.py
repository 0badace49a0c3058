"""
Ends every command of this project with one exit code per kind of failure, and a message.

    64   usage: the command line is wrong
    65   bad input: a file or a value cannot be used
    69   unavailable: a file, a port, a package or memory is missing
    70   a bug
    130  interrupted (Ctrl-C)
    141  broken pipe: the reader of the output has closed it

The codes 64 to 70 are those of BSD's sysexits.h; 130 and 141 are 128 plus the signal's number, as
in a shell. Codes 0, 1 and 2 belong to verdicts, so no failure ends with 1 or 2. Every package may
import this module; it imports none of them.
"""

from __future__ import annotations

import argparse
import codecs
import functools
import importlib
import importlib.metadata
import io
import os
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

# No command sends telemetry. Every command imports this module before the libraries that would.
# OpenVINO and NNCF start a child process that reports to a foreign host, stores an id in the home
# folder and keeps every open socket of its parent. They work without this package.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
# ONNX Runtime reports its sessions to a foreign host, and stores an id and a database in the cache
# folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

USAGE = 64
BAD_INPUT = 65
UNAVAILABLE = 69
BUG = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

SCRIPTS = {
    "service": "drbert-serve",
    "export": "drbert-export",
    "client": "drbert-classify",
    "client.compare": "drbert-compare",
    "proof": "drbert-prove",
    "training.pretrain": "drbert-pretrain",
    "training.finetune": "drbert-finetune",
    "training.evaluate": "drbert-evaluate",
    "training.experiment": "drbert-experiment",
    "training.curves": "drbert-curves",
}
"""Console script of each command, by its module."""
FAILURES = f"""\
  {USAGE}   the command line is wrong
  {BAD_INPUT}   a file or a value cannot be used
  {UNAVAILABLE}   a file, a port, a package or memory is missing
  {BUG}   a bug
  {INTERRUPTED}  interrupted (Ctrl-C)
"""
"""The lines of the exit codes that every command has."""

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process by default without an exception, and so without any clean-up."""

Main = Callable[[Sequence[str]], int]
"""A command: it takes its arguments and returns its exit code."""


class CommandError(Exception):
    """A failure that the user can fix; the message says what happened and how to fix it."""

    exit_code = BUG
    """Exit code of a command that ends with this error."""


class BadUsage(CommandError):
    """The command line is wrong."""

    exit_code = USAGE


class BadInput(CommandError):
    """A file or a value was read and cannot be used."""

    exit_code = BAD_INPUT


class Unavailable(CommandError):
    """Something that the command needs is missing: a file, a port, a package."""

    exit_code = UNAVAILABLE


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end with 64 instead of argparse's 2.

    It has --version, and its help ends with the exit codes. `results` are lines about the codes
    below 64, and `notes` follow the exit codes.
    """

    def __init__(
        self, prog: str | None = None, *, results: str = "  0   done", notes: str = "", **more: Any
    ) -> None:
        codes = f"exit codes:\n{results.rstrip()}\n{FAILURES}"
        more["epilog"] = "\n".join(filter(None, (codes, notes)))
        more["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, **more)
        self.add_argument(
            "--version",
            action="version",
            version=f"DrBERT Serve {installed_version()}",
            help="print the version and exit",
        )

    def error(self, message: str) -> NoReturn:
        """Print the usage and raise BadUsage."""
        self.print_usage(sys.stderr)
        raise BadUsage(message)


@functools.cache
def installed_version() -> str:
    """Return the version of the installed package, or of the checkout that runs as it is."""
    try:
        return importlib.metadata.version("drbert-serve")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).with_name("pyproject.toml")
        if not pyproject.is_file():
            return "unknown"
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return str(project["version"])


def how_to_install(extra: str) -> str:
    """Return how to install an extra, as the end of a sentence.

    It names no package of an index: this one is not on PyPI, where anybody could take its name.
    """
    target = f"'.[{extra}]'" if extra else "."
    return f"run `pip install {target}` in the checkout of DrBERT Serve"


def program_name(module: str) -> str:
    """Return the command of a module that was run: its console script, or `python -m MODULE`."""
    name = module.removesuffix(".__main__")
    return SCRIPTS.get(name, f"python -m {name}")


def _script_of(module: str) -> str:
    """Return the console script whose code a module is a part of."""
    name = module
    while name and name not in SCRIPTS:
        name = name.rpartition(".")[0]
    return program_name(name or module)


def report_missing_packages(package: str) -> None:
    """Let the command that is starting end with one line and 69 if an import of its fails.

    A package whose commands import others at the top of their module calls this in its
    `__init__.py`, which runs before. Without a command that is starting, nothing changes.
    """
    name = Path(sys.argv[0] if sys.argv else "").name
    if name == "-m":  # `python -m MODULE`, whose name is not in sys.argv yet
        name = program_name(sys.orig_argv[sys.orig_argv.index("-m") + 1])
    elif name not in SCRIPTS.values():
        return
    hook = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, ModuleNotFoundError):
            hook(kind, error, trace)
            return
        code, message = _failure(error, package)
        print(f"{name}: {message}", file=sys.stderr)
        sys.exit(code)

    sys.excepthook = report


def use_utf8() -> None:
    """Switch the standard streams from ASCII to UTF-8.

    Python uses ASCII where the locale is C, and printing a letter like é would end the command.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8")


@contextmanager
def exit_on_termination_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit with the shell's code, 128 + number, in the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread can set handlers; no signal ends another thread.
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # nohup starts a process that ignores SIGHUP, so that it outlives its terminal.
    previous = {
        number: signal.signal(number, stop)
        for number in TERMINATION_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def finish(main: Main | str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code, or with the code of its failure.

    `main` is the command, or "module:function" where its imports may be missing: it is imported
    here. `arguments` default to those of the process.
    """
    module = main.partition(":")[0] if isinstance(main, str) else main.__module__
    spec = sys.modules["__main__"].__spec__
    name = program_name(spec.name) if spec else _script_of(module)
    code: int | None = None
    use_utf8()
    try:
        run = _import(main) if isinstance(main, str) else main
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, head or less, has closed the pipe. A verdict that was reached still counts.
        # Python flushes stdout once more at exit; /dev/null keeps it from printing an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE if code is None else code
    except (Exception, KeyboardInterrupt) as error:
        code, message = _failure(error, module)
        print(f"{name}: {message}", file=sys.stderr)
    sys.exit(code)


def _import(path: str) -> Main:
    """Return the command at "module:function"."""
    module, _, function = path.partition(":")
    main: Main = getattr(importlib.import_module(module), function)
    return main


def _failure(error: BaseException, module: str) -> tuple[int, str]:
    """Return the exit code and the message of a command that ended with an error.

    The traceback of a bug is printed to stderr.
    """
    match error:
        case CommandError():
            return error.exit_code, str(error)
        case ModuleNotFoundError():
            package = (error.name or "?").partition(".")[0]
            # What the service needs is the base install.
            extra = module.partition(".")[0].removeprefix("service")
            message = f"the package {package} is not installed; {how_to_install(extra)}"
            if {"-h", "--help"} & set(sys.argv[1:]):
                message += "; docs/commands.md there has the options"
            return UNAVAILABLE, message
        case KeyboardInterrupt():
            return INTERRUPTED, "interrupted"
        case MemoryError():
            return UNAVAILABLE, (
                "there is not enough memory; raise the limit of the process (ulimit -v) or of its"
                " container"
            )
        case OSError():
            place = error.filename or "the system"
            return UNAVAILABLE, f"{place}: {error.strerror or first_line(error)}"
        case RuntimeError() if "can't start new thread" in str(error):
            return UNAVAILABLE, (
                "no thread could be started; raise the limits of processes and memory (ulimit -u"
                " and -v), or those of the container"
            )
    traceback.print_exception(error)
    return BUG, "this is a bug; report it with the traceback above"
