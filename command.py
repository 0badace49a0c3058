"""
How every command of this project ends: with a line that names the remedy, and an exit code that means one thing.

    64 usage · 65 bad input · 69 something needed is not there · 70 a bug · 130 interrupted

The codes are those of BSD's sysexits.h. 0, 1 and 2 belong to verdicts alone, so nothing
here ever ends with 1 or 2. Every room may import this file; it imports none of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

USAGE = 64
BAD_INPUT = 65
UNAVAILABLE = 69
BUG = 70
INTERRUPTED = 130


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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end with 64 instead of argparse's 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise BadUsage(message)


def finish(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command to its end and exits with its code; every way to fail has one."""
    spec = sys.modules["__main__"].__spec__
    name = (spec.name if spec else main.__module__).removesuffix(".__main__")
    try:
        code = main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except CommandError as error:
        code = error.exit_code
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print(f"{name}: interrupted", file=sys.stderr)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; silence Python's complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception:
        traceback.print_exc()
        code = BUG
        print(f"{name}: this is a bug; the traceback above says where.", file=sys.stderr)
    sys.exit(code)
