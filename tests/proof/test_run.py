"""A whole run, with real servers and a real load generator; what it finds is the machine's business."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from graphs.canonical import split
from graphs.files import read_graph
from proof.commands import main
from proof.evidence import read_requests
from proof.judge import EXIT_CODES
from proof.plan import read_plan
from service.artifact import Artifact
from tests.service.test_server import free_port, serving
from tests.worlds import write_artifact


def honest_artifact(folder: Path) -> Artifact:
    """With the digests that its graph really has."""
    draft = write_artifact(folder.with_name(f"{folder.name}-draft"))
    encoder, head = split(read_graph(draft.path("model.onnx")))
    variant = draft.manifest.variants["cpu-fp32"].model_copy(update={"encoder_digest": encoder.digest, "head_digest": head.digest})
    return write_artifact(folder, encoder_digest=encoder.digest, head_digest=head.digest, variants={"cpu-fp32": variant})


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    honest_artifact(tmp_path / "artifact")
    arms = "\n".join(
        f'[[arm]]\nname = "{name}"\nrole = "{role}"\nartifact = "{tmp_path / "artifact"}"'
        for name, role in (("a", "reference"), ("a2", "reference"), ("b", "candidate"), ("b2", "candidate"))
    )
    (tmp_path / "texts.txt").write_text("good\nbad film a b c\n")
    path = tmp_path / "plan.toml"
    path.write_text(f"""
name = "small"
seed = 1
texts = "{tmp_path / "texts.txt"}"
{arms}
[level.unloaded]
restarts = 4
tuples = 8
warm_up_tuples = 2
margins = {{ inference = {{ p50 = 0.5 }}, end_to_end = {{ p50 = 0.5 }} }}
[server]
port = {free_port()}
cpus = [0]
settings = {{ warm_up_s = 0 }}
[generator]
cpus = [1]
""")
    return path


def test_a_run_leaves_sealed_evidence_that_is_judged_alike_again(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", str(plan), "--evidence", str(tmp_path / "evidence")])
    printed = capsys.readouterr().out
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    verdict = json.loads((folder / "verdict.json").read_text())
    assert code == EXIT_CODES[verdict["verdict"]]
    assert f"verdict: {verdict['verdict']}." in printed
    assert f"report: {folder / 'report.html'}" in printed
    assert main(["judge", str(folder)]) == code
    assert {path.name for path in folder.iterdir()} == {
        "plan.toml", "texts.txt", "identity.json", "environment.json", "starts.csv", "restarts.csv", "requests.parquet",
        "verdict.json", "report.html", "run.json", "run.log", "MANIFEST.sha256",
    }
    rows = read_requests(folder).to_pylist()
    starts = len({row["restart"] for row in rows})
    assert starts >= 4
    assert len(rows) == starts * 4 * (2 + 8)
    assert {row["status"] for row in rows} == {200}
    assert verdict["run"]["number_for_this_plan"] == 1
    assert all(row["scheduled_ns"] <= row["sent_ns"] < row["done_ns"] for row in rows)
    assert all(0 < row["inference_us"] < row["total_us"] < (row["done_ns"] - row["sent_ns"]) / 1000 for row in rows)
    assert len({row["instance"] for row in rows}) == starts
    [entry] = json.loads((tmp_path / "evidence/index.json").read_text())
    assert entry["number_for_this_plan"] == 1
    report = (folder / "report.html").read_text()
    assert "http://" not in report
    assert "https://" not in report


def test_an_interrupted_run_is_sealed_with_what_was_measured(plan: Path, tmp_path: Path) -> None:
    plan.write_text(plan.read_text().replace("tuples = 8", "tuples = 4000", 1))
    command = [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(tmp_path / "evidence")]
    # A shell that runs this in the background has its children ignore Ctrl-C; this one must hear it.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hearing
    ) as process:
        give_up = time.monotonic() + 120
        while not any(file.stat().st_size > 20_000 for file in tmp_path.glob("evidence/*/rows/*.csv")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "what was measured is sealed in" in printed
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    assert read_requests(folder).num_rows > 50
    assert main(["judge", str(folder)]) == EXIT_CODES["invalid"]


def test_a_server_that_dies_costs_its_restart_and_no_more(plan: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(tmp_path / "evidence")]
    plan.write_text(plan.read_text().replace("tuples = 8", "tuples = 100", 1))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        give_up = time.monotonic() + 120
        while not any(file.stat().st_size > 20_000 for file in tmp_path.glob("evidence/*/rows/000.csv")):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        for child in psutil.Process(process.pid).children():
            if "service" in child.cmdline():
                child.kill()
        printed = process.communicate(timeout=240)[0]
    assert process.returncode in EXIT_CODES.values(), printed
    assert "restart 0 is dropped and repeated" in printed
    assert "requests without a good answer" in printed


def test_an_artifact_that_is_not_there_is_named_before_anything_runs(plan: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(tmp_path / "evidence")]
    (tmp_path / "artifact/manifest.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "has no manifest.json" in done.stderr
    assert not (tmp_path / "evidence").exists()


def test_locust_alone_looks_at_a_running_server(artifact: Artifact, tmp_path: Path) -> None:
    with serving(artifact) as (url, _):
        command = [sys.executable, "-m", "locust", "-f", "loadtests/", "--headless", "--only-summary", "--host", url]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"ROWS": str(tmp_path / "rows.csv")})
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0].startswith("run,level,restart,instance")
    assert len(lines) > 250


def test_a_plan_for_servers_of_ones_own_is_not_restarted(plan: Path, tmp_path: Path) -> None:
    changed = plan.read_text().replace(f'artifact = "{tmp_path / "artifact"}"', 'url = "http://127.0.0.1:1"')
    plan.write_text(changed)
    assert read_plan(plan).arms[0].url
    done = subprocess.run([sys.executable, "-m", "proof", "run", str(plan)], capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert "every arm names an artifact" in done.stderr
