"""`locust -f loadtests/` is a load test; with PLAN it sends one restart of the plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proof.plans.plan_file import read_plan
from service.artifact import Artifact
from tests.factories import write_artifact
from tests.proof.factories import write_plan
from tests.service.test_server import free_port, running, serving

LOADTESTS = Path("loadtests").resolve()


def locust(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Locust without its page, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(LOADTESTS), "--headless", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | environment,
    )


def test_users_send_texts_to_every_model_and_its_statistics_have_a_line_for_each(
    artifact: Artifact, tmp_path: Path
) -> None:
    other = write_artifact(tmp_path / "other").directory
    with running(f"bert={artifact.directory}", f"drbert={other}") as (url, _):
        done = locust(tmp_path, "--host", url, "-u", "5", "-r", "5", "-t", "2s", "--only-summary")
    assert done.returncode == 0, done.stderr
    assert "Ramping to 5 users" in done.stderr
    lines = [line.split() for line in done.stderr.splitlines()]
    for model in ("bert", "drbert"):
        [requests] = [
            int(line[2]) for line in lines if line[:2] == ["POST", model] and "%)" in line[3]
        ]
        assert requests > 5
    assert not (tmp_path / "evidence").exists()


def test_models_and_texts_are_chosen_by_options(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("good\nbad\n")
    with running(f"bert={artifact.directory}", f"drbert={artifact.directory}") as (url, _):
        options = ("--host", url, "-t", "1s", "--only-summary", "--texts", "texts.txt")
        done = locust(tmp_path, *options, "--models", "drbert")
        unknown = locust(tmp_path, *options, "--models", "drbert,reviews")
    assert done.returncode == 0, done.stderr
    assert "POST     drbert" in done.stderr
    assert "POST     bert" not in done.stderr
    assert unknown.returncode == 64
    assert "locust: --models reviews: the server has bert, drbert." in unknown.stderr


def test_an_answer_that_is_refused_is_a_failure_with_its_reason(
    artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("much too long\n")
    with serving(artifact, DRBERT_MAX_TEXT_CHARS="5") as (url, _):
        done = locust(tmp_path, "--host", url, "-t", "1s", "--only-summary", "--texts", "texts.txt")
    assert done.returncode == 1
    assert "status 413: input has 13 characters" in done.stderr


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = locust(tmp_path, "--host", url, "-t", "1s")
    assert done.returncode == 69
    assert f"locust: {url} did not answer: Connection refused. Start a server" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 64, "--host names the server"),
        (["--host", "http://127.0.0.1:9", "--texts", "none.txt"], 69, "did not answer"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = locust(tmp_path, *arguments, "-t", "1s")
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_without_its_server_names_the_command_that_starts_it(tmp_path: Path) -> None:
    path = write_plan(tmp_path).path
    port = free_port()
    path.write_text(f"{path.read_text()}\n[server]\nport = {port}\n")
    plan = read_plan(path)
    done = locust(tmp_path, PLAN=str(plan.path))
    assert done.returncode == 69
    assert f"The plan's server at http://127.0.0.1:{plan.port} did not answer" in done.stderr
    assert "`DRBERT_BUSY_WAIT=loopback drbert-serve bert=" in done.stderr
    assert f"--port {plan.port}`" in done.stderr
    assert "Traceback" not in done.stderr
