"""
How every command of this project ends: with a line that names the remedy, and an exit code that
means one thing.

    64 usage · 65 bad input · 69 something needed is not there · 70 a bug · 130 interrupted · 141
        broken pipe

The codes are those of BSD's sysexits.h. 0, 1 and 2 belong to verdicts alone, so nothing
here ever ends with 1 or 2. Every room may import this file; it imports none of them.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# Nothing phones home. Every command imports this file before any library that would. OpenVINO and
# NNCF fork a child that reports to an outside host, leaves an id in the home folder and keeps open
# every socket that the process has; where this package cannot be imported they do without.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
# ONNX Runtime reports its sessions to an outside host and leaves an id and a database in the cache
# folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

USAGE = 64
BAD_INPUT = 65
UNAVAILABLE = 69
BUG = 70
INTERRUPTED = 130
BROKEN_PIPE = 141


class CommandError(Exception):
    """Something the person at the keyboard can mend; the message says how."""

    exit_code = BUG


class BadUsage(CommandError):
    """The command line does not fit the command."""

    exit_code = USAGE


class BadInput(CommandError):
    """A file or value was read and cannot be used."""

    exit_code = BAD_INPUT


class Unavailable(CommandError):
    """Something the command needs is not there: a file, a port, a package."""

    exit_code = UNAVAILABLE


def first_line(error: Exception) -> str:
    """What a library's error says first, or its kind where it says nothing; for a message of our
    own.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end with 64 instead of argparse's 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise BadUsage(message)


def speak_utf8() -> None:
    """Read and write UTF-8 where the locale is C: its ASCII has no letter of most languages, and
    printing one would end the command.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8")


def finish(
    main: Callable[[Sequence[str]], int] | str, arguments: Sequence[str] | None = None
) -> NoReturn:
    """Runs a command to its end and exits with its code; every way to fail has one.

    A command whose imports may be missing is given as "module:function" and imported here.
    """
    module = main.partition(":")[0] if isinstance(main, str) else main.__module__
    spec = sys.modules["__main__"].__spec__
    name = (spec.name if spec else module).removesuffix(".__main__")
    code: int | None = None
    speak_utf8()
    try:
        run: Callable[[Sequence[str]], int] = (
            getattr(importlib.import_module(module), main.partition(":")[2])
            if isinstance(main, str)
            else main
        )
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except CommandError as error:
        code = error.exit_code
        print(f"{name}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        code = UNAVAILABLE
        package, extra = (error.name or "?").partition(".")[0], module.partition(".")[0]
        print(
            f"{name}: the package {package} is not installed; pip install 'drbert-serve[{extra}]'",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
        print(f"{name}: interrupted", file=sys.stderr)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. A verdict already reached stands; Python's
        # complaint at exit does not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE if code is None else code
    except MemoryError:
        code = UNAVAILABLE
        print(
            f"{name}: there is not enough memory; give the process more (ulimit -v, or its"
            " container's limit)",
            file=sys.stderr,
        )
    except OSError as error:
        code = UNAVAILABLE
        print(f"{name}: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            code = UNAVAILABLE
            print(
                f"{name}: no thread could be started; allow more processes or memory (ulimit -u and"
                " -v, or its container's limits)",
                file=sys.stderr,
            )
            sys.exit(code)
        traceback.print_exc()
        code = BUG
        print(f"{name}: this is a bug; the traceback above says where.", file=sys.stderr)
    sys.exit(code)
