"""No command depends on the locale: text files and output are UTF-8."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories import write_artifact
from tests.service.test_server import classify, running

SOURCES = [
    "atomic.py",
    "command.py",
    "client",
    "graphs",
    "service",
    "training",
    "export",
    "proof",
    "loadtests",
]
LOCALE_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
# Modules whose open() opens no text.
BINARY = {"os", "tarfile", "zipfile"}


def reads_in_the_locale(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that open a file as text and name no encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(
            keyword.arg in ("encoding", None) for keyword in node.keywords
        ):
            continue
        match node.func:
            case ast.Attribute(attr="read_text"):
                arguments = 1
            case ast.Attribute(attr="write_text"):
                arguments = 2
            case ast.Attribute(value=ast.Name(id=module), attr="open") if module in BINARY:
                continue
            case ast.Attribute(attr="open"):
                arguments = 3 if "b" not in mode_of(node, 0) else 0
            case ast.Name(id="open"):
                arguments = 4 if "b" not in mode_of(node, 1) else 0
            case _:
                continue
        if len(node.args) < arguments:
            yield node


def mode_of(call: ast.Call, position: int) -> str:
    """Return the mode of a call of open(), which is an argument by name or at a position."""
    by_keyword = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    match by_keyword or call.args[position : position + 1]:
        case [ast.Constant(value=value)]:
            return str(value)
    return "r"


@pytest.mark.parametrize("source", SOURCES)
def test_every_call_that_opens_a_text_file_names_its_encoding(source: str) -> None:
    files = [Path(source)] if source.endswith(".py") else sorted(Path(source).rglob("*.py"))
    assert files
    calls: list[str] = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls += [f"{file}:{call.lineno}" for call in reads_in_the_locale(tree)]
    assert not calls


def test_an_artifact_with_letters_beyond_ascii_is_served_in_locale_c(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "reviews", labels=["ŠPATNÉ", "良い"])
    tokenizer = (
        artifact.path("tokenizer.json")
        .read_text(encoding="utf-8")
        .replace('"endless"', '"žluťoučký"')
    )
    (tmp_path / "again").mkdir()
    served = write_artifact(
        tmp_path / "again" / "reviews",
        labels=["ŠPATNÉ", "良い"],
        files_as={"tokenizer.json": tokenizer},
    )
    directory = served.directory.rename(tmp_path / "známky")
    with running(str(directory), **LOCALE_C) as (url, process):
        answer = classify(url, "good žluťoučký")
        assert (answer["model"], answer["data"][0]["label"]) == ("známky", "良い")
        with urllib.request.urlopen(f"{url}/info", timeout=30) as response:
            assert "známky" in json.load(response)["models"]
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0].isascii()  # its log is JSON
        assert process.returncode == 0


@pytest.mark.parametrize(
    "body",
    [
        "print('žluťoučký'); return 0",
        "raise BadInput('žluťoučký')",
        "print(sys.stdin.read().strip()); return 0",
    ],
)
def test_a_command_reads_and_prints_utf8_in_locale_c(body: str) -> None:
    program = (
        "import sys\nfrom command import BadInput, finish\ndef main(arguments):\n   "
        f" {body.encode('unicode_escape').decode()}\nfinish(main, [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="žluťoučký".encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
        | LOCALE_C,
    )
    assert "žluťoučký" in done.stdout.decode(), done.stdout
    assert done.returncode in (0, 65)


@pytest.mark.parametrize("module", ["service", "proof", "client"])
def test_help_is_printed_in_locale_c(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        check=False,
        env=os.environ | LOCALE_C,
    )
    assert done.returncode == 0, done.stderr
