"""Every command ends with the exit code of its failure, and never with a verdict's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from command import BadInput, Parser, Unavailable, finish, installed_version


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (BadInput("x"), 65),
        (Unavailable("x"), 69),
        (MemoryError(), 69),
        (RuntimeError("can't start new thread"), 69),
        (RuntimeError("x"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_failure_has_its_exit_code(
    raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: object) -> int:
        raise raised

    with pytest.raises(SystemExit) as ended:
        finish(main, [])
    assert ended.value.code == code
    errors = capsys.readouterr().err
    is_bug = code == 70
    assert ("this is a bug" in errors.splitlines()[-1]) == is_bug
    assert ("Traceback" in errors) == is_bug


def test_an_error_of_the_system_names_the_file_and_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(arguments: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "texts.txt")

    with pytest.raises(SystemExit) as ended:
        finish(main, [])
    assert ended.value.code == 69
    assert capsys.readouterr().err.endswith(": texts.txt: No such file or directory\n")


def test_a_wrong_command_line_ends_with_64_and_not_with_a_verdict() -> None:
    def main(arguments: list[str]) -> int:
        Parser(prog="x").parse_args(["--unknown"])
        return 0

    with pytest.raises(SystemExit) as ended:
        finish(main, [])  # type: ignore[arg-type]
    assert ended.value.code == 64


COMMANDS = {
    "service": "drbert-serve",
    "export": "drbert-export",
    "proof": "drbert-prove",
    "client": "drbert-classify",
    "client.compare": "drbert-compare",
    "training.pretrain": "drbert-pretrain",
    "training.finetune": "drbert-finetune",
    "training.evaluate": "drbert-evaluate",
    "training.experiment": "drbert-experiment",
    "training.curves": "drbert-curves",
    "benchmarks": "python -m benchmarks",
}
"""Each command's module, and the name that its help page shows."""


@pytest.mark.parametrize(("module", "name"), COMMANDS.items())
def test_every_command_has_a_help_page_and_a_version_and_refuses_an_unknown_option_with_64(
    module: str, name: str
) -> None:
    helped = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False
    )
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"usage: {name}")
    for code in ("64   the command line is wrong", "69   a file, a port, a package"):
        assert code in helped.stdout
    version = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout == f"DrBERT Serve {installed_version()}\n"
    wrong = subprocess.run(
        [sys.executable, "-m", module, "--nonsense"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 64
    assert wrong.stderr.splitlines()[-1].startswith(f"{name}: ")


MISSING = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["{script}", "y", "z"]
from {module} import run
run()
"""
"""Runs a command where a package is not installed."""


@pytest.mark.parametrize(
    ("script", "module", "package", "target"),
    [
        ("drbert-prove", "proof.__main__", "scipy", "'.[proof]'"),
        ("drbert-export", "export.__main__", "torch", "'.[export]'"),
        ("drbert-compare", "client.compare.__main__", "aiohttp", "'.[client]'"),
        ("drbert-serve", "service.__main__", "uvicorn", "."),
        ("drbert-pretrain", "training.pretrain", "torch", "'.[training]'"),
        ("drbert-evaluate", "training.evaluate", "torch", "'.[training]'"),
    ],
)
def test_a_missing_package_ends_with_69_and_not_with_a_verdict(
    script: str, module: str, package: str, target: str
) -> None:
    code = MISSING.format(script=script, module=module, package=package)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 69, done.stderr
    [line] = done.stderr.splitlines()
    assert line == (
        f"{script}: the package {package} is not installed; run `pip install {target}` in the"
        " checkout of DrBERT Serve"
    )


def test_help_that_cannot_be_shown_names_the_page_that_has_it() -> None:
    code = MISSING.format(script="drbert-export", module="export.__main__", package="torch")
    code = code.replace('"y", "z"', '"--help"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 69, done.stderr
    assert done.stderr.endswith("docs/commands.md there has the options\n")


@pytest.mark.parametrize(
    ("body", "code"), [("print('x' * 200_000); return 1", 141), ("print('x'); return 1", 1)]
)
def test_a_closed_pipe_never_turns_a_verdict_into_success(body: str, code: int) -> None:
    program = (
        "import time\nfrom command import finish\ndef main(arguments):\n    time.sleep(0.3)\n   "
        f" {body}\nfinish(main, [])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(30) == code
