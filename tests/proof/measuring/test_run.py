"""A whole run, with real servers and a real load generator; what it finds is the machine's
business.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from command import BadInput, Unavailable
from graphs.canonical import split
from graphs.files import read_graph
from proof.commands import main
from proof.evidence.answers import ExpectedAnswers
from proof.evidence.store import EvidenceRejected
from proof.measuring import index, run
from proof.measuring.expected_answers import expect_answers
from proof.measuring.launch import free_port
from proof.measuring.run import drop_reason
from proof.measuring.servers import SERVER_NICE
from proof.plans.claim_digest import digest_claim
from proof.plans.plan import Plan
from proof.plans.plan_file import read_plan
from proof.verdict.schema import EXIT_CODES
from service.artifact import Artifact
from tests.factories import write_artifact
from tests.proof.factories import write_evidence, write_plan


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "requests.parquet").to_pylist()
    return rows


def honest_artifact(folder: Path, **changes: Any) -> Artifact:
    """With the digests that its graph really has."""
    draft = write_artifact(folder.with_name(f"{folder.name}-draft"))
    encoder, head = split(read_graph(draft.path("model.onnx")))
    variant = draft.manifest.variants["cpu-fp32"].model_copy(
        update={"encoder_digest": encoder.digest, "head_digest": head.digest}
    )
    return write_artifact(
        folder,
        encoder_digest=encoder.digest,
        head_digest=head.digest,
        variants={"cpu-fp32": variant},
        **changes,
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    honest_artifact(tmp_path / "artifact")
    arms = "\n".join(
        f'[[arm]]\nname = "{name}"\nrole = "{role}"\nartifact = "{tmp_path / "artifact"}"'
        for name, role in (
            ("a", "reference"),
            ("a2", "reference"),
            ("b", "candidate"),
            ("b2", "candidate"),
        )
    )
    arms += '\n[[arm]]\nname = "slow"\nrole = "delayed"'
    (tmp_path / "texts.txt").write_text("good\nbad film a b c\n")
    path = tmp_path / "plan.toml"
    path.write_text(f"""
name = "small"
seed = 1
texts = "{tmp_path / "texts.txt"}"
restarts = 4
capacity_per_s = 100.0
{arms}
[level.unloaded]
tuples = 32
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


def test_a_plan_with_a_beta_of_no_pilot_begins_no_run(plan: Path, tmp_path: Path) -> None:
    text = plan.read_text().replace("restarts = 4\n", "restarts = 4\nschedule_version = 2\n")
    adjusted = """
[level.switchback-50]
rate_per_s = 50.0
slice_requests = 20
sets = 15
margins = { end_to_end_adjusted = { p50 = 0.5 }, dilation = { mean = 0.5 } }
betas = { end_to_end_adjusted = { p50 = 1.7 } }
[server]"""
    plan.write_text(text.replace("[server]", adjusted))
    with pytest.raises(BadInput, match=r"the β 1.7 of .* p50 is not its pilot's \(None\)"):
        main(["run", str(plan), "--evidence", str(tmp_path / "evidence")])
    assert not (tmp_path / "evidence").exists()


def test_a_run_leaves_sealed_evidence_that_is_judged_alike_again(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["run", str(plan), "--evidence", str(tmp_path / "evidence")])
    printed = capsys.readouterr().out
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    verdict = json.loads((folder / "verdict.json").read_text())
    assert code == EXIT_CODES[verdict["verdict"]]
    assert f"verdict: {verdict['verdict']}." in printed
    assert f"report: {folder / 'report.html'}" in printed
    assert main(["judge", str(folder)]) == code
    assert {path.name for path in folder.iterdir()} == {
        "plan.toml",
        "texts.txt",
        "identity.json",
        "environment.json",
        "starts.csv",
        "restarts.csv",
        "requests.parquet",
        "verdict.json",
        "report.html",
        "run.json",
        "answers.json",
        "MANIFEST.sha256",
    }
    rows = read_rows(folder)
    starts = len({row["restart"] for row in rows})
    assert starts >= 4
    assert len(rows) == starts * 4 * (2 + 32)
    assert {row["status"] for row in rows} == {200}
    assert verdict["run"]["number_for_this_plan"] == 1
    assert all(row["scheduled_ns"] <= row["sent_ns"] < row["done_ns"] for row in rows)
    assert all(
        0 < row["inference_us"] < row["total_us"] < (row["done_ns"] - row["sent_ns"]) / 1000
        for row in rows
    )
    assert all(row["inference_cpu_us"] > 0 for row in rows)
    assert {row["first_of_shape"] for row in rows} == {0}, "every shape was warmed up"
    assert {(row["text_id"], row["label"]) for row in rows} == {(0, "POSITIVE"), (1, "NEGATIVE")}
    assert {row["score_count"] for row in rows} == {2}
    answers = next(
        gate
        for gate in verdict["levels"]["unloaded"]["gates"]
        if gate["name"].startswith("answers")
    )
    assert answers["passed"]
    assert answers["found"].startswith(f"0 of {4 * 4 * (2 + 32)} answers differ")
    assert all(row["batch_id"] > 0 for row in rows)
    assert len({row["instance"] for row in rows}) == starts
    [entry] = json.loads((tmp_path / "evidence/index.json").read_text())
    assert entry.pop("outcome") == verdict["verdict"]
    assert entry == json.loads((folder / "run.json").read_text())
    assert (entry["number_for_this_plan"], entry["number_for_this_claim"]) == (1, 1)
    assert "run 1 of this plan, 1 of its claim" in printed
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["resident_bytes_of_all_arms_together"] > 20e6
    # Root may set it; without the right to, the server runs at the usual 0.
    assert environment["server_nice"] in (SERVER_NICE, 0)
    assert environment["server"]["engines"]["openvino"]
    assert verdict["scope"]["served"]["candidate"]["packs"] in (True, False)
    assert verdict["scope"]["service_version"]
    assert verdict["scope"]["own_files"] is False
    identity = json.loads((folder / "identity.json").read_text())
    assert identity["b"]["artifact_bytes"][0] == identity["b"]["artifact_bytes"][1] > 1000
    report = (folder / "report.html").read_text()
    assert "http://" not in report
    assert "https://" not in report


def test_a_server_that_answers_garbage_is_invalid(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The artifact is exchanged after its answers were computed, as by a server that cheats.
    def cheat(checked: Plan) -> ExpectedAnswers:
        expected = expect_answers(checked).model_dump()
        for answer in expected["models"][0]["answers"]:
            answer["label"] = {"POSITIVE": "NEGATIVE", "NEGATIVE": "POSITIVE"}[answer["label"]]
        return ExpectedAnswers.model_validate(expected)

    plan.write_text(plan.read_text().replace("[server]", "[level.repeat]\ntexts = 4\n[server]"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "expect_answers", cheat)
        code = main(["run", str(plan), "--evidence", str(tmp_path / "evidence")])
    assert code == EXIT_CODES["invalid"]
    printed = capsys.readouterr().out
    assert "FAIL answers are the artifact's own: 544 of 1,184 answers differ" in printed
    assert "no cache answers repeated texts: repeated over first answers" in printed


def stopped_after(written: int, rows: str, sent: signal.Signals, plan: Path) -> tuple[int, str]:
    """The exit code and output of a run that gets a signal once a file of rows has `written` bytes.

    The signal goes to the whole group when it is SIGKILL, so that nothing is left behind.
    """
    evidence = plan.parent / "evidence"
    command = [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(evidence)]
    # A shell that runs this in the background has its children ignore Ctrl-C; this one must hear
    # it.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hearing,
        start_new_session=True,
    ) as process:
        give_up = time.monotonic() + 120
        while not any(file.stat().st_size > written for file in evidence.glob(f"*/rows/{rows}")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.02)
        if sent == signal.SIGKILL:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        printed = process.communicate(timeout=60)[0]
    return process.returncode, printed


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_sealed_with_what_was_measured(
    sent: signal.Signals, plan: Path, tmp_path: Path
) -> None:
    plan.write_text(plan.read_text().replace("tuples = 32", "tuples = 4000", 1))
    code, printed = stopped_after(20_000, "*.csv", sent, plan)
    assert code == 130
    [entry] = json.loads((tmp_path / "evidence/index.json").read_text())
    assert entry["outcome"] == "stopped"
    assert "what was measured is sealed in" in printed
    assert "--resume" in printed
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    assert len(read_rows(folder)) > 50
    with socket.socket() as probe:  # The server is gone too.
        assert probe.connect_ex(("127.0.0.1", read_plan(plan).port)) != 0
    assert main(["judge", str(folder)]) == EXIT_CODES["invalid"]


def test_what_a_stopping_server_refuses_is_put_down_to_the_interruption() -> None:
    refused = "1 requests without a good answer, the first (unloaded.1.-1.0.1) with status 503"
    assert drop_reason(refused, cut_short=True) == "interrupted"
    assert (
        drop_reason(refused, cut_short=False) == refused
    )  # every request was sent: the judge finds the same in the rows
    assert drop_reason("", cut_short=False) == ""


def test_an_interrupted_run_is_resumed_and_keeps_every_row(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Long enough that the interruption cannot fall after a restart's last row, which would make it
    # count.
    plan.write_text(plan.read_text().replace("tuples = 32", "tuples = 160", 1))
    code, printed = stopped_after(5_000, "001.csv", signal.SIGINT, plan)
    assert code == 130, printed
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    before = read_rows(folder)
    code = main(["run", "--resume", str(folder)])
    verdict = json.loads((folder / "verdict.json").read_text())
    level = verdict["levels"]["unloaded"]
    assert code == EXIT_CODES[verdict["verdict"]]
    assert level["restarts_kept"] + level["restarts_dropped"] == len(
        {row["restart"] for row in read_rows(folder)}
    )
    assert [row for row in read_rows(folder) if row["restart"] < 2] == before
    assert "interrupted" in (folder / "starts.csv").read_text()
    assert main(["judge", str(folder)]) == code
    with pytest.raises(BadInput, match="there is nothing to go on with"):
        main(["run", "--resume", str(folder)])


def test_a_killed_run_is_resumed_too(plan: Path, tmp_path: Path) -> None:
    # Long enough that the interruption cannot fall after a restart's last row, which would make it
    # count.
    plan.write_text(plan.read_text().replace("tuples = 32", "tuples = 160", 1))
    stopped_after(5_000, "001.csv", signal.SIGKILL, plan)
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    code = main(["run", "--resume", str(folder)])
    assert code in EXIT_CODES.values()
    assert main(["judge", str(folder)]) == code
    assert "interrupted" in (folder / "starts.csv").read_text()


def test_rows_survive_a_full_disk_and_the_run_reports_it(plan: Path, tmp_path: Path) -> None:
    plan.write_text(plan.read_text().replace("tuples = 32", "tuples = 400", 1))
    command = [
        sys.executable,
        "-m",
        "proof",
        "run",
        str(plan),
        "--evidence",
        str(tmp_path / "evidence"),
    ]
    # No file may grow beyond 60 kB: what a full disk does, to one process and its children.
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (60_000, 60_000))
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small)
    assert done.returncode == 69, done.stderr
    assert "000.csv cannot be written" in done.stderr
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    assert len(read_rows(folder)) > 100
    assert "the load generator failed" in (folder / "starts.csv").read_text()


def test_all_levels_run_and_are_audited(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A proxy that is not there: the servers of a run are reached without it.
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    # The second copy of each model has files of its own.
    before, *arms = plan.read_text().split("[[arm]]")
    for number in (1, 3):
        arms[number] = arms[number].replace('artifact"', 'copy"')
    shutil.copytree(tmp_path / "artifact", tmp_path / "copy")
    plan.write_text("[[arm]]".join([before, *arms]))
    assert read_plan(plan).arms[1].artifact == str(tmp_path / "copy")
    plan.write_text(
        plan.read_text()
        .replace(
            "[server]",
            """
[level.mixed-50]
tuples = 32
warm_up_tuples = 2
margins = { inference = { p50 = 0.5 } }
[level.switchback-50]
margins = { end_to_end = { p50 = 0.5 } }
[level.capacity]
slice_s = 0.2
in_flight = 4
margins = { time_per_text = { mean = 0.5 } }
[server]""",
        )
        .replace("capacity_per_s = 100.0", "capacity_per_s = 1000.0")
        .replace("tuples = 32", "tuples = 64", 1)
    )
    done = subprocess.run(
        [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(tmp_path / "evidence")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in EXIT_CODES.values(), done.stderr
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    assert main(["judge", str(folder)]) == done.returncode
    rows = read_rows(folder)
    assert {row["level"] for row in rows} == {"unloaded", "mixed-50", "switchback-50", "capacity"}
    scope = json.loads((folder / "verdict.json").read_text())["scope"]
    assert scope["own_files"] is True
    delayed = [row for row in rows if row["arm"] == "slow" and row["level"] == "unloaded"]
    assert len(delayed) == len({row["restart"] for row in rows}) * 16


def test_the_capacity_of_the_reference_is_a_number_for_the_plan(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capacity", str(plan), "--seconds", "0.3"]) == 0
    name, _, value = capsys.readouterr().out.strip().partition(" = ")
    assert name == "capacity_per_s"
    assert float(value) > 10


def test_a_level_with_a_rate_needs_the_capacity_first(plan: Path) -> None:
    plan.write_text(
        plan.read_text()
        .replace("capacity_per_s = 100.0\n", "")
        .replace(
            "[server]",
            "[level.mixed-50]\ntuples = 32\nmargins = { inference = { p50 = 0.5 } }\n[server]",
        )
    )
    with pytest.raises(BadInput, match="needs capacity_per_s; `drbert-prove capacity"):
        main(["run", str(plan)])


def test_a_server_that_dies_costs_its_restart_and_no_more(plan: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "proof",
        "run",
        str(plan),
        "--evidence",
        str(tmp_path / "evidence"),
    ]
    plan.write_text(plan.read_text().replace("tuples = 32", "tuples = 100", 1))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        give_up = time.monotonic() + 120
        while not any(
            file.stat().st_size > 20_000 for file in tmp_path.glob("evidence/*/rows/000.csv")
        ):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        for child in psutil.Process(process.pid).children():
            if "service" in child.cmdline():
                child.kill()
        printed = process.communicate(timeout=240)[0]
    assert process.returncode in EXIT_CODES.values(), printed
    assert "restart 0 is dropped and repeated" in printed
    assert "requests without a good answer" in printed


def test_an_artifact_that_is_not_there_is_named_before_anything_runs(
    plan: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "proof",
        "run",
        str(plan),
        "--evidence",
        str(tmp_path / "evidence"),
    ]
    (tmp_path / "artifact/manifest.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "has no manifest.json" in done.stderr
    assert not (tmp_path / "evidence").exists()


def test_a_plan_for_servers_of_ones_own_is_not_restarted(plan: Path, tmp_path: Path) -> None:
    changed = plan.read_text().replace(
        f'artifact = "{tmp_path / "artifact"}"', 'url = "http://127.0.0.1:1"'
    )
    plan.write_text(changed)
    assert read_plan(plan).arms[0].url
    done = subprocess.run(
        [sys.executable, "-m", "proof", "run", str(plan)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 65
    assert "[server] has no restart command" in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Unavailable("The port is taken.")])
def test_an_interruption_before_the_first_row_costs_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "serve_arms", fail)
    plan = write_plan(tmp_path / "plan")
    folder = tmp_path / "evidence"
    folder.mkdir()
    for _ in range(3):
        with pytest.raises(type(error)):
            run._measure_restart(plan, 1, 1, "run", folder)
    assert run._recorded_restarts(folder) == []
    assert list(folder.rglob("*.csv")) == []


def test_resuming_a_run_that_cannot_become_valid_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_evidence(tmp_path / "run", restarts=4, dropped=(1, 2, 4), sealed=False)
    monkeypatch.setattr(run, "_execute", lambda _: None)
    run.resume_run(folder)
    assert "3 restarts of this run were dropped. Of 7 in all" in capsys.readouterr().out


def test_the_copies_of_a_model_may_have_files_of_their_own(plan: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "artifact", tmp_path / "copy"
    assert len(set(run._check_copies(read_plan(plan)).values())) == 1
    plan.write_text(plan.read_text().replace(str(first), str(second), 1))
    shutil.copytree(first, second)
    assert len(set(run._check_copies(read_plan(plan)).values())) == 1
    shutil.rmtree(second)
    second.symlink_to(first)
    with pytest.raises(BadInput, match=r"share the file .*; copy the folder with `cp -r`"):
        run._check_copies(read_plan(plan))
    second.unlink()
    honest_artifact(second, name="another")
    with pytest.raises(BadInput, match=r"are two artifacts \(\w{12} and \w{12}\)"):
        run._check_copies(read_plan(plan))


def test_runs_of_a_claim_are_counted_whatever_byte_of_the_plan_changed(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", control=False)
    renamed = tmp_path / "plan/other.toml"
    renamed.write_text(
        plan.path.read_text().replace('"small"', '"other"').replace("seed = 7", "seed = 8")
    )
    wider = tmp_path / "plan/wider.toml"
    wider.write_text(plan.path.read_text().replace("p99 = 0.10", "p99 = 0.11"))
    evidence = tmp_path / "evidence"
    evidence.mkdir()

    def begin(path: Path, name: str, artifact: str = "1") -> tuple[int, int]:
        begun = read_plan(path)
        artifacts = dict.fromkeys((arm.name for arm in begun.arms), artifact)
        claim = digest_claim(begun, artifacts, b"texts")
        entry = index.append_run(evidence, evidence / name, begun, claim)
        return entry["number_for_this_plan"], entry["number_for_this_claim"]

    assert begin(plan.path, "a") == (1, 1)
    assert begin(renamed, "b") == (1, 2)
    assert begin(plan.path, "c") == (2, 3)
    assert begin(wider, "d") == (1, 1)
    assert begin(plan.path, "e", artifact="2") == (3, 1)
    index.record_outcome(evidence / "b", "stopped")
    runs = json.loads((evidence / "index.json").read_text())
    assert [entry["outcome"] for entry in runs] == [
        "started",
        "stopped",
        "started",
        "started",
        "started",
    ]
    # A new checkout begins with the published runs.
    (evidence / "published").mkdir()
    (evidence / "index.json").rename(evidence / "published/index.json")
    assert begin(plan.path, "f") == (4, 4)
    (evidence / "index.json").write_text("{}")
    with pytest.raises(EvidenceRejected, match="is no list of runs"):
        begin(plan.path, "g")
