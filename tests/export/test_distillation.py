"""A checkpoint is distilled to fewer layers, resumes, and passes or fails its gate honestly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command import BadUsage
from export import distillation
from export.checkpoint.loading import build_model, read_checkpoint
from export.checkpoint.reference import Reference, load_model
from export.checkpoint.tokenizer import load_tokenizer
from export.checks import gate
from export.commands import main
from export.distillation import (
    Distillation,
    Lessons,
    answer_loss,
    distil,
    kept_layers,
    student_weights,
)
from proof.verdict.identity import compare, describe
from service.artifact import read_artifact
from service.runtimes import RuntimeUnavailable
from service.runtimes.auto import choose
from tests.export.factories import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks
WORDS = ("good", "bad", "film", "a", "b", "c")


def write_texts(path: Path, count: int, first: str = "a") -> Path:
    """Write so many different texts."""
    texts = [
        " ".join(
            [first, *(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(5))]
        )
        for number in range(count)
    ]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_a_student_begins_with_evenly_spaced_layers_and_the_last() -> None:
    assert kept_layers(12, 6) == [1, 3, 5, 7, 9, 11]
    assert kept_layers(4, 2) == [1, 3]
    assert kept_layers(6, 4) == [1, 2, 4, 5]
    assert kept_layers(3, 1) == [2]


def test_a_student_has_its_teachers_embeddings_head_and_chosen_layers(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(write_checkpoint(tmp_path / "checkpoint", layers=4)))
    teacher = build_model(checkpoint).state_dict()
    weights = student_weights(build_model(checkpoint), 4, 2)
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(weights[name.format(0)], teacher[name.format(1)])
    assert torch.equal(weights[name.format(1)], teacher[name.format(3)])
    assert name.format(2) not in weights
    assert torch.equal(weights["classifier.weight"], teacher["classifier.weight"])


def test_the_losses_are_least_for_the_teachers_answers() -> None:
    teacher = torch.tensor([[2.0, -1.0], [0.5, 1.5]])
    for task in ("single_label", "multi_label", "regression"):
        same = float(answer_loss(teacher, teacher, task))
        other = float(answer_loss(teacher.flip(1), teacher, task))
        assert same < other
    assert float(answer_loss(teacher, teacher, "single_label")) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def lessons(tmp_path: Path) -> Lessons:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=4)
    texts = write_texts(tmp_path / "texts.txt", 96).read_text().splitlines()
    return Lessons(texts, load_tokenizer(checkpoint), "single_label", 16)


def test_training_brings_the_student_nearer_to_its_teacher(
    tmp_path: Path, lessons: Lessons
) -> None:
    teacher = read_checkpoint(str(tmp_path / "checkpoint"))

    def distance(epochs: int) -> float:
        folder = tmp_path / f"student-{epochs}"
        settings = Distillation(Path("texts"), 2, epochs=epochs, learning_rate=1e-3)
        student = distil(teacher, lessons, settings, folder)
        ours, theirs = (
            Reference(load_model(each), lessons.tokenizer, lessons.max_tokens).logits(lessons.texts)
            for each in (student, teacher)
        )
        return float(((ours - theirs) ** 2).mean())

    assert distance(8) < distance(1)


def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path,
    lessons: Lessons,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = read_checkpoint(str(tmp_path / "checkpoint"))
    settings = Distillation(Path("texts"), 2, epochs=3)
    whole = distil(teacher, lessons, settings, tmp_path / "whole")
    monkeypatch.setattr(distillation, "SAVE_EVERY_S", -1.0)
    step, steps = distillation._Training._step, []

    def interrupted(training: distillation._Training, number: int) -> float:
        steps.append(number)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(training, number)

    monkeypatch.setattr(distillation._Training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, lessons, settings, tmp_path / "parts")
    resumed = distil(teacher, lessons, settings, tmp_path / "parts")
    assert steps[:6] == [0, 1, 2, 3, 4, 4]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
    # With other settings it begins anew, and the hours of the earlier one are kept.
    other = distil(teacher, lessons, Distillation(Path("texts"), 2, epochs=1), tmp_path / "parts")
    assert not torch.equal(other.tensors[name], resumed.tensors[name])
    assert "an earlier training had another recipe, and" in capsys.readouterr().out
    assert (tmp_path / "parts.before/state.pt").is_file()
    # A full disk may have left half a description.
    (tmp_path / "parts/description.json").write_text('{"teacher"')
    distil(teacher, lessons, Distillation(Path("texts"), 2, epochs=1), tmp_path / "parts")
    assert "had another beginning" in capsys.readouterr().out


def test_another_teacher_or_other_settings_begin_anew(tmp_path: Path, lessons: Lessons) -> None:
    teacher = read_checkpoint(str(tmp_path / "checkpoint"))
    folder = tmp_path / "student"
    two = distil(teacher, lessons, Distillation(Path("texts"), 2, epochs=1), folder)
    three = distil(teacher, lessons, Distillation(Path("texts"), 3, epochs=1), folder)
    assert (two.config["num_hidden_layers"], three.config["num_hidden_layers"]) == (2, 3)


def test_an_artifact_of_a_student_that_disagrees_is_not_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MIN_TEXTS", 40)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=4)
    command = [str(checkpoint), str(tmp_path / "artifact"), "--variants", "cpu-fp32"]
    command += ["--distill", str(write_texts(tmp_path / "texts.txt", 64)), "--layers", "2"]
    command += ["--gate", str(write_texts(tmp_path / "gate.txt", 48, first="b")), "--epochs", "1"]
    # No student reaches a bound of 0.999 with 48 texts.
    assert main([*command, "--agreement", "0.999", "--require-gate"]) == 1
    manifest = read_artifact(tmp_path / "artifact").manifest
    assert manifest.distilled is not None
    assert (manifest.distilled.teacher_layers, manifest.distilled.layers) == (4, 2)
    assert manifest.distilled.gate.status == "failed"
    assert manifest.name == "checkpoint"
    with pytest.raises(RuntimeUnavailable, match="distilled to 2 of 4 layers"):
        choose(read_artifact(tmp_path / "artifact"))
    assert "of 48 texts get the teacher's answer" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*distilling"))
    assert main([*command, "--agreement", "0.01", "--require-gate"]) == 0
    assert choose(read_artifact(tmp_path / "artifact")).variant == "cpu-fp32"


def test_identity_says_that_a_student_is_another_graph(tmp_path: Path) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", layers=4))
    texts = str(write_texts(tmp_path / "texts.txt", 32))
    options = ["--variants", "cpu-fp32"]
    main([checkpoint, str(tmp_path / "large"), *options])
    options += ["--distill", texts, "--layers", "2", "--epochs", "1"]
    main([checkpoint, str(tmp_path / "small"), *options])
    result = compare(tmp_path / "large", tmp_path / "small")
    assert not result["same"]
    assert 'claim = "non-inferiority"' in describe(result)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["distilled"]["gate"]["status"] == "ungated"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--distill", "TEXTS"), "--distill needs --layers"),
        (("--layers", "2"), "belong to --distill"),
        (("--distill", "TEXTS", "--layers", "4"), "--layers is 4, and .* has 4; give 1 to 3"),
        (("--distill", "TEXTS", "--layers", "0"), "--layers is 0"),
        (("--distill", "TEXTS", "--layers", "2", "--epochs", "0"), "--epochs is 0"),
        (("--distill", "TEXTS", "--layers", "2", "--keep-decoder"), "a larger one"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", layers=4))
    texts = str(write_texts(tmp_path / "texts.txt", 8))
    arguments = [texts if option == "TEXTS" else option for option in options]
    with pytest.raises(BadUsage, match=words):
        main([checkpoint, str(tmp_path / "artifact"), *arguments])
