"""Instructions of small artifacts: counted for real where that is possible, else as recorded."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command import BadInput, BadUsage, CommandError, Unavailable
from proof.commands import main
from proof.work import counting
from proof.work.counters import SOFTWARE, TASK_CLOCK, Counter
from proof.work.counting import CountOptions, count_work
from proof.work.schema import read_work
from proof.work.workload import Loading, Method, Workload, choose_method, running
from service.artifact import Artifact
from tests.factories import write_artifact
from tests.proof.measuring.test_run import honest_artifact
from tests.proof.verdict.test_claim import evidence_of
from tests.requirements import counted_instructions

MANY_LABELS = tuple(f"LABEL_{number}" for number in range(64))


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Artifact, Artifact]:
    return honest_artifact(tmp_path / "a"), honest_artifact(tmp_path / "b")


class RecordedWorkload:
    """A plain workload whose instructions are taken from a list, one number for each process."""

    def __init__(self, workload: Workload, instructions: int) -> None:
        self._workload = workload
        self._instructions = instructions
        self._copies = 1
        self.loaded = workload.loaded

    def prepare(self, text: str, max_tokens: int | None, copies: int) -> dict[str, Any]:
        self._copies = copies
        return self._workload.prepare(text, max_tokens, copies)

    def count(self, repetitions: int) -> int:
        # Asking for runs takes 2,000 instructions.
        return 2000 + repetitions * self._copies * self._instructions

    def kill(self) -> None:
        self._workload.kill()


def record(monkeypatch: pytest.MonkeyPatch, **instructions: tuple[int, ...]) -> None:
    """Let the processes of each artifact, by its folder's name, count these instructions."""
    remaining = {name: list(counts) for name, counts in instructions.items()}

    @contextlib.contextmanager
    def recorded(loading: Loading, method: Method | None) -> Iterator[Any]:
        with running(loading, None) as workload:
            if method is None:
                yield workload
            else:
                yield RecordedWorkload(workload, remaining[loading.artifact.name].pop(0))

    monkeypatch.setattr(counting, "running", recorded)
    monkeypatch.setattr(counting, "choose_method", lambda requested: "counters")


def work(twins: tuple[Artifact, Artifact], *options: str) -> int:
    return main(["work", str(twins[0].directory), str(twins[1].directory), *options])


def test_twins_execute_the_same_instructions(
    twins: tuple[Artifact, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(monkeypatch, a=(1_000_000, 1_000_010), b=(1_000_020, 1_000_000))
    assert work(twins, "--json", str(tmp_path / "work.json")) == 0
    printed = capsys.readouterr().out
    assert "8 tokens alone" in printed
    assert "work: same. b executes as many instructions for a text as a, within ±0.1 %" in printed
    written = read_work(tmp_path / "work.json")
    assert [artifact.digest for artifact in written.artifacts] == [each.digest for each in twins]
    assert [each.texts for each in written.measurements] == [1, 64]
    # What asking for runs takes is subtracted.
    assert written.measurements[0].instructions[0] == [1_000_000, 1_000_010]


def test_more_instructions_are_different_work(
    twins: tuple[Artifact, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(monkeypatch, a=(1_000_000, 1_000_000), b=(1_480_000, 1_480_000))
    assert work(twins) == 1
    assert "work: different. b does not execute as many" in capsys.readouterr().out


def test_the_margin_is_the_users(
    twins: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    for margin, code in (("0.01", 0), ("0.001", 1)):
        record(monkeypatch, a=(1_000_000, 1_000_000), b=(1_005_000, 1_005_000))
        assert work(twins, "--margin", margin) == code


def test_two_copies_that_disagree_tell_nothing(
    twins: tuple[Artifact, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(monkeypatch, a=(1_000_000, 1_010_000), b=(1_000_000, 1_000_000))
    assert work(twins) == 2
    assert "Cannot tell: two copies of one artifact differ by 1.0000%" in capsys.readouterr().out


def test_the_texts_of_a_file_are_counted_at_their_own_lengths(
    twins: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("good\n\ngood film\na b c good bad film\n")
    record(monkeypatch, a=(1_000, 1_000), b=(1_000, 1_000))
    options = CountOptions(texts=texts)
    counted = count_work(twins[0].directory, twins[1].directory, options)
    assert [each.tokens[0] for each in counted.measurements if each.texts == 1] == [3, 4, 8]
    texts.write_text("\n")
    with pytest.raises(BadInput, match="holds no text"):
        count_work(twins[0].directory, twins[1].directory, options)
    with pytest.raises(BadUsage, match="not both"):
        work(twins, "--texts", str(texts), "--lengths", "8")


def test_a_claim_is_verified_together_with_the_work(
    twins: tuple[Artifact, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evidence = evidence_of(tmp_path / "run", *twins)
    command = ["verify-claim", *(str(each.directory) for each in twins), str(evidence), "--work"]
    record(monkeypatch, a=(1_000_000, 1_000_000), b=(1_000_000, 1_000_000))
    assert main(command) == 0
    assert "work: same." in capsys.readouterr().out
    record(monkeypatch, a=(1_000_000, 1_000_000), b=(1_100_000, 1_100_000))
    assert main(command) == 1


def test_without_valgrind_and_counters_one_line_names_the_remedy(
    twins: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("proof.work.workload.unavailable_reason", lambda: "there is no counter")
    with pytest.raises(CommandError, match="apt-get install valgrind") as raised:
        work(twins)
    assert raised.value.exit_code == 69
    assert len(str(raised.value).splitlines()) == 1


def test_counters_come_before_valgrind_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proof.work.workload.unavailable_reason", lambda: None)
    assert choose_method("auto") == "counters"
    monkeypatch.setattr("proof.work.workload.unavailable_reason", lambda: "there is no counter")
    with pytest.raises(Unavailable, match="there is no counter; pass --method valgrind"):
        choose_method("counters")


def test_what_cannot_be_counted_is_refused_in_one_line(tmp_path: Path) -> None:
    artifact = honest_artifact(tmp_path / "a")
    variant = artifact.manifest.variants["cpu-fp32"]
    on_gpu = variant.model_copy(update={"runtime": "cuda", "precision": "f16"})
    gpu = write_artifact(tmp_path / "gpu", variants={"cuda-fp16": on_gpu})
    for options, words in (
        (CountOptions(variant="cuda-fp16"), "whose instructions cannot be counted"),
        (CountOptions(variant="cpu-fp32"), "holds no variant 'cpu-fp32'; it holds cuda-fp16"),
    ):
        with pytest.raises(BadInput, match=words):
            count_work(gpu.directory, gpu.directory, options)


def test_bf16_is_not_counted_on_a_processor_without_it(tmp_path: Path) -> None:
    artifact = honest_artifact(tmp_path / "a")
    variant = artifact.manifest.variants["cpu-fp32"].model_copy(update={"precision": "bf16"})
    folder = write_artifact(tmp_path / "b", variants={"cpu-bf16": variant}).directory
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(counting, "choose_method", lambda requested: "valgrind")
        with pytest.raises(Unavailable, match="no instructions for bf16"):
            count_work(folder, folder, CountOptions(variant="cpu-bf16"))


def test_a_process_that_cannot_load_its_artifact_says_why(tmp_path: Path) -> None:
    artifact = honest_artifact(tmp_path / "a")
    loading = Loading(artifact.directory, "cpu-int8", "auto")
    with (
        pytest.raises(CommandError, match="holds no variant 'cpu-int8'") as raised,
        running(loading, None),
    ):
        pass
    assert raised.value.exit_code == 69


def test_a_counter_counts_the_threads_of_another_process(tmp_path: Path) -> None:
    """By the CPU time of its threads, which can be counted where instructions cannot."""
    artifact = honest_artifact(tmp_path / "a")
    with running(Loading(artifact.directory, "cpu-fp32", "auto"), None) as workload:
        try:
            counter = Counter(workload.pid, SOFTWARE, TASK_CLOCK)
        except Unavailable:
            return  # a sandbox that forbids every kind of counter
        workload.prepare("good film", 8, 2)
        before = counter.read()
        workload.run(50)
        assert counter.read() > before
        counter.close()


def test_a_process_that_has_ended_has_no_counter() -> None:
    pid = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(pid, 0)
    with pytest.raises(Unavailable, match="there is no hardware counter"):
        Counter(pid)


@counted_instructions
def test_real_counts_agree_for_twins_and_differ_for_more_labels(tmp_path: Path) -> None:
    a, b = honest_artifact(tmp_path / "a"), honest_artifact(tmp_path / "b")
    # Python's own work is a large and less regular share of so small a model's.
    options = CountOptions(lengths=(8,), quick=True, margin=0.01)
    assert count_work(a.directory, b.directory, options).verdict == "same"
    wide = write_artifact(tmp_path / "wide", labels=MANY_LABELS)
    counted = count_work(a.directory, wide.directory, options)
    assert counted.verdict == "different"
    assert all(each.ratio > 1 for each in counted.measurements)
    assert json.loads(counted.model_dump_json())["verdict"] == "different"
