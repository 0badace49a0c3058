"""The gate of an int8 variant: counted agreement with fp32, over texts that calibration has not seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from command import BadInput, CommandError, Unavailable
from export.commands import export, main
from export.gate import judge, lower_bound
from export.texts import SHIPPED, Labelled, read_texts, without
from graphs.canonical import split
from graphs.files import read_graph
from service import cpus
from service.artifact import Artifact, Gate, read_artifact
from service.classifier import Classifier
from service.runtimes import Inputs, Logits
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime
from service.shapes import CPU, Grid
from tests.export.worlds import write_checkpoint
from tests.worlds import write_artifact

LABELS = ("NEGATIVE", "POSITIVE")


@dataclass
class Flipping:
    """The engine it wraps, but for some texts it answers with the other label."""

    inner: OpenVinoRuntime
    flips: int
    name: str = "flipping"
    device: str = "CPU"
    precision: str = "i8"
    flush_to_zero: bool = True
    computes_in: str = "f32"
    in_flight: int = 1
    grid: Grid = CPU
    seen: int = field(default=0, init=False)

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        logits = self.inner.start(inputs)()
        flipped = np.arange(self.seen, self.seen + len(logits)) < self.flips
        self.seen += len(logits)
        logits[flipped] = logits[flipped, ::-1]
        return lambda: logits


def gate_of(artifact: Artifact, texts: list[Labelled], flips: int, wanted: float = 0.99) -> Gate:
    engine = OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1)
    return judge(Classifier(artifact, engine), Classifier(artifact, Flipping(engine, flips)), artifact, texts, wanted)


def sentences(count: int) -> list[Labelled]:
    """Distinct texts, each with one good or one bad word and so with a label."""
    fillers = itertools.product(("a", "b", "c", "film"), repeat=7)
    return [Labelled(f"{word} {' '.join(rest)}", label) for rest in itertools.islice(fillers, count // 2) for word, label in (("bad", LABELS[0]), ("good", LABELS[1]))]


@pytest.mark.parametrize(("agreeing", "texts"), [(5000, 5000), (4950, 5000), (1, 10)])
def test_were_the_share_at_the_bound_so_much_agreement_would_be_seen_once_in_twenty_times(agreeing: int, texts: int) -> None:
    assert stats.binom.sf(agreeing - 1, texts, lower_bound(agreeing, texts)) == pytest.approx(0.05)


def test_where_nothing_agrees_the_bound_is_nothing() -> None:
    assert lower_bound(0, 10) == 0


def test_a_variant_passes_if_the_bound_of_its_agreement_reaches_what_was_asked(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    passed = gate_of(artifact, sentences(5000), flips=10)
    assert passed.status == "passed"
    assert passed.agreement is not None
    assert passed.agreement.agreeing == 4990
    assert passed.agreement.accuracy_of_fp32 == 1
    assert passed.agreement.accuracy == 0.998
    assert passed.reason.startswith("4,990 of 5,000 texts get the fp32 answer, 99.80%, at least 99.66% at 95% confidence (asked: 99.00%)")


def test_a_share_above_the_limit_whose_bound_is_below_it_fails(tmp_path: Path) -> None:
    gate = gate_of(write_artifact(tmp_path / "artifact"), sentences(5000), flips=45)
    assert gate.status == "failed"
    assert gate.agreement is not None
    assert gate.agreement.agreeing / gate.agreement.texts > 0.99 > gate.agreement.lower_bound


def test_few_texts_cannot_open_the_gate_however_well_they_agree(tmp_path: Path) -> None:
    gate = gate_of(write_artifact(tmp_path / "artifact"), sentences(4000), flips=0)
    assert gate.status == "failed"
    assert "over at least 5,000 texts" in gate.reason


def test_an_int8_export_without_gate_texts_is_ungated_and_answers_nearly_as_fp32_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert main([str(checkpoint), str(tmp_path / "artifact"), "--variants", "cpu-fp32,cpu-int8"]) == 0
    printed = capsys.readouterr().out
    assert "calibrating with 89 texts of those that come along" in printed
    assert "cpu-int8: ungated: no texts to gate it with; give --gate FILE with at least 5,000" in printed


def test_int8_is_served_in_no_lower_precision_than_its_gate_was_passed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not quantise would run in bf16 on a processor that has it, and the gate vouch for something else."""
    calibration, gate = tmp_path / "calibration.txt", tmp_path / "gate.txt"
    calibration.write_text("good film\nbad film\n")
    gate.write_text("a good film\na bad film\n")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    manifest = export(str(checkpoint), tmp_path / "artifact", variants=["cpu-fp32", "cpu-int8"], calibration=calibration, gate=gate)
    agreement = manifest.variants["cpu-int8"].gate.agreement
    assert agreement is not None
    assert agreement.rest == ("bf16" if "bf16" in cpus.native_precisions() else "f32")

    artifact = read_artifact(tmp_path / "artifact")
    for passed_in, native, expected in (("f32", {"f32", "bf16", "i8"}, "f32"), ("bf16", {"f32", "i8"}, "f32"), ("f32", {"f32", "i8"}, "f32")):
        monkeypatch.setattr(cpus, "native_precisions", lambda native=native: native)
        held = artifact.manifest.variants["cpu-int8"]
        gated = held.model_copy(update={"gate": held.gate.model_copy(update={"agreement": agreement.model_copy(update={"rest": passed_in})})})
        changed = Artifact(artifact.directory, artifact.manifest.model_copy(update={"variants": artifact.manifest.variants | {"cpu-int8": gated}}))
        runtime = load(changed, Choice("cpu-int8", "openvino", "test"), 1)
        assert isinstance(runtime, OpenVinoRuntime)
        assert runtime.rest == expected


def test_twins_have_one_int8_digest_whatever_their_weights_and_texts(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("good film\nbad film\na b c\n")
    digests = set()
    for seed, calibration in ((1, SHIPPED), (2, tmp_path / "own.txt")):
        manifest = export(
            str(write_checkpoint(tmp_path / f"c{seed}", seed=seed)), tmp_path / f"a{seed}", variants=["cpu-fp32", "cpu-int8"], calibration=calibration
        )
        held = manifest.variants["cpu-int8"]
        digests.add((held.encoder_digest, held.head_digest, held.weight_bytes))
        encoder, _ = split(read_graph(tmp_path / f"a{seed}/model-int8.xml"))
        assert any(node.operator.endswith("FakeQuantize") for node in encoder.nodes)
    assert len(digests) == 1


def test_texts_that_calibrated_do_not_gate() -> None:
    texts = [Labelled("good"), Labelled("bad")]
    assert without(texts, ["bad"]) == [Labelled("good")]


def test_a_file_of_texts_holds_each_once_and_its_label(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("good film\n\n  bad film \ngood film\n")
    assert read_texts(tmp_path / "t.txt", LABELS) == [Labelled("good film"), Labelled("bad film")]
    (tmp_path / "t.jsonl").write_text('{"text": "a", "text_pair": "b", "label": "POSITIVE"}\n{"text": "a"}\n')
    assert read_texts(tmp_path / "t.jsonl", LABELS) == [Labelled(("a", "b"), "POSITIVE"), Labelled("a")]


BAD_FILES = {
    "": "holds no text",
    "{": r"line 1 is not JSON",
    '{"text": "a", "colour": "red"}': "must be an object with text",
    '{"text": 3}': "text is 3; it must be a string that is not empty",
    '{"label": "POSITIVE"}': "line 1 has no text",
    '{"text": "a", "label": "HAPPY"}': r"label 'HAPPY' is none of the model's \(NEGATIVE, POSITIVE\)",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_file_of_texts_that_cannot_be_used_is_refused_by_its_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(BadInput, match=BAD_FILES[content]):
        read_texts(tmp_path / "t.jsonl", LABELS)


def test_texts_that_are_missing_or_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"none\.txt cannot be read"):
        read_texts(tmp_path / "none.txt", LABELS)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BadInput, match="is not UTF-8"):
        read_texts(tmp_path / "latin.txt", LABELS)


def test_an_agreement_that_is_no_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--agreement 99.0 is no share"):
        main([str(write_checkpoint(tmp_path / "c")), str(tmp_path / "a"), "--agreement", "99"])
