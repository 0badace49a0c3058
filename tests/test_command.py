from __future__ import annotations

import subprocess
import sys

import pytest

from command import BadInput, Parser, Unavailable, finish


@pytest.mark.parametrize(
    ("raised", "code"), [(BadInput("x"), 65), (Unavailable("x"), 69), (RuntimeError("x"), 70), (KeyboardInterrupt(), 130)]
)
def test_every_way_to_fail_has_its_exit_code(raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: object) -> int:
        raise raised

    with pytest.raises(SystemExit) as ended:
        finish(main, [])
    assert ended.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert ("bug" in last) == (code == 70)


def test_a_wrong_command_line_ends_with_64_and_not_with_a_verdict() -> None:
    def main(arguments: list[str]) -> int:
        Parser(prog="x").parse_args(["--what"])
        return 0

    with pytest.raises(SystemExit) as ended:
        finish(main, [])  # type: ignore[arg-type]
    assert ended.value.code == 64


COMMANDS = ["service", "export", "proof", "training.pretrain", "training.finetune", "training.evaluate"]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_explains_itself_and_refuses_nonsense_with_64(module: str) -> None:
    helped = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert f"python -m {module}" in helped.stdout
    wrong = subprocess.run([sys.executable, "-m", module, "--nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 64
    assert wrong.stderr.splitlines()[-1].startswith(f"{module}: ")
