"""The gate of an int8 variant counts its agreement with fp32, on texts not used for calibration."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from command import BadInput, BadUsage, CommandError, Unavailable
from export.checks.gate import judge, lower_bound
from export.commands import main
from export.graph.variants import gated_variants
from export.pipeline import Quantization, export
from export.texts import BUNDLED_TEXTS, LabelledText, excluding, read_texts
from graphs.canonical import split
from graphs.files import read_graph
from service.artifact import Artifact, Gate, read_artifact
from service.batching.shapes import CPU, Grid
from service.classifier import Classifier
from service.host import cpus
from service.runtimes import Inputs, Logits
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime
from tests.export.factories import HIDDEN, write_checkpoint
from tests.factories import write_artifact

LABELS = ("NEGATIVE", "POSITIVE")


@dataclass
class Flipping:
    """An engine that answers the first `flips` texts with the other label."""

    inner: OpenVinoRuntime
    flips: int
    name: str = "flipping"
    device: str = "CPU"
    precision: str = "i8"
    flush_to_zero: bool = True
    computes_in: str = "f32"
    graph_digest: str | None = None
    in_flight: int = 1
    grid: Grid = CPU
    answered: int = field(default=0, init=False)

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        logits = self.inner.start(inputs)()
        flipped = np.arange(self.answered, self.answered + len(logits)) < self.flips
        self.answered += len(logits)
        logits[flipped] = logits[flipped, ::-1]
        return lambda: logits


def gate_of(
    artifact: Artifact,
    texts: list[LabelledText],
    flips: int,
    required: float = 0.99,
    required_per_label: float | None = None,
) -> Gate:
    engine = OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1)
    return judge(
        Classifier(artifact, engine),
        Classifier(artifact, Flipping(engine, flips)),
        artifact,
        texts,
        required,
        required_per_label=required_per_label,
    )


def sentences(count: int) -> list[LabelledText]:
    """Return distinct texts, each with a good or a bad word, and so with a label."""
    fillers = itertools.product(("a", "b", "c", "film"), repeat=7)
    return [
        LabelledText(f"{word} {' '.join(filler)}", label)
        for filler in itertools.islice(fillers, count // 2)
        for word, label in (("bad", LABELS[0]), ("good", LABELS[1]))
    ]


@pytest.mark.parametrize(("agreeing", "texts"), [(5000, 5000), (4950, 5000), (1, 10)])
def test_if_the_true_share_were_the_bound_this_agreement_would_occur_once_in_twenty_times(
    agreeing: int, texts: int
) -> None:
    assert stats.binom.sf(agreeing - 1, texts, lower_bound(agreeing, texts)) == pytest.approx(0.05)


def test_without_agreement_the_bound_is_zero() -> None:
    assert lower_bound(0, 10) == 0


def test_a_variant_passes_if_the_lower_bound_reaches_the_required_agreement(
    tmp_path: Path,
) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    passed = gate_of(artifact, sentences(5000), flips=10)
    assert passed.status == "passed"
    assert passed.agreement is not None
    assert passed.agreement.agreeing == 4990
    assert passed.agreement.accuracy_of_fp32 == 1
    assert passed.agreement.accuracy == 0.998
    assert passed.reason.startswith(
        "4,990 of 5,000 texts get the fp32 answer, 99.80%, at least 99.66% at 95% confidence"
        " (asked: 99.00%)"
    )


def test_a_share_above_the_limit_whose_bound_is_below_it_fails(tmp_path: Path) -> None:
    gate = gate_of(write_artifact(tmp_path / "artifact"), sentences(5000), flips=45)
    assert gate.status == "failed"
    assert gate.agreement is not None
    assert gate.agreement.agreeing / gate.agreement.texts > 0.99 > gate.agreement.lower_bound


def test_too_few_texts_fail_the_gate_however_well_they_agree(tmp_path: Path) -> None:
    gate = gate_of(write_artifact(tmp_path / "artifact"), sentences(4000), flips=0)
    assert gate.status == "failed"
    assert "over at least 5,000 texts" in gate.reason


def test_an_int8_export_without_gate_texts_is_ungated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert (
        main([str(checkpoint), str(tmp_path / "artifact"), "--variants", "cpu-fp32,cpu-int8"]) == 0
    )
    printed = capsys.readouterr().out
    assert "calibrating with 89 bundled texts" in printed
    assert (
        "cpu-int8: ungated: no texts to gate it with; give --gate FILE with at least 5,000"
        in printed
    )


def test_a_failed_gate_ends_the_command_with_1_only_if_it_is_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, texts = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "texts.txt"
    texts.write_text("good film\nbad film\n")
    command = [str(checkpoint), str(tmp_path / "artifact"), "--gate", str(texts)]
    assert main(command) == 0
    assert main([*command, "--require-gate"]) == 1
    assert "texts.txt has 2 texts that calibration has not seen; the gate needs 5,000" in (
        capsys.readouterr().out
    )
    variants = read_artifact(tmp_path / "artifact").manifest.variants
    assert variants["cpu-int8"].gate.status == "failed"


def test_int8_is_served_in_no_lower_precision_than_it_passed_its_gate_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators that are not quantised would run in bf16 on a processor that has it, which the gate
    did not test.
    """
    calibration_file, gate_file = tmp_path / "calibration.txt", tmp_path / "gate.txt"
    calibration_file.write_text("good film\nbad film\n")
    gate_file.write_text("a good film\na bad film\n")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    manifest = export(
        str(checkpoint),
        tmp_path / "artifact",
        variants=["cpu-fp32", "cpu-int8"],
        quantization=Quantization(calibration_file, gate_file),
    )
    agreement = manifest.variants["cpu-int8"].gate.agreement
    assert agreement is not None
    assert agreement.unquantized_precision == (
        "bf16" if "bf16" in cpus.native_precisions() else "f32"
    )

    artifact = read_artifact(tmp_path / "artifact")
    for passed_in, native, expected in (
        ("f32", {"f32", "bf16", "i8"}, "f32"),
        ("bf16", {"f32", "i8"}, "f32"),
        ("f32", {"f32", "i8"}, "f32"),
    ):
        monkeypatch.setattr(cpus, "native_precisions", lambda native=native: native)
        variant = artifact.manifest.variants["cpu-int8"]
        gate = variant.gate.model_copy(
            update={"agreement": agreement.model_copy(update={"unquantized_precision": passed_in})}
        )
        gated = variant.model_copy(update={"gate": gate})
        changed = Artifact(
            artifact.directory,
            artifact.manifest.model_copy(
                update={"variants": artifact.manifest.variants | {"cpu-int8": gated}}
            ),
        )
        runtime = load(changed, Choice("cpu-int8", "openvino", "test"), 1)
        assert isinstance(runtime, OpenVinoRuntime)
        assert runtime.unquantized_precision == expected


def test_twins_have_one_int8_digest_whatever_their_weights_and_texts(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("good film\nbad film\na b c\n")
    digests = set()
    for seed, calibration in ((1, BUNDLED_TEXTS), (2, tmp_path / "own.txt")):
        manifest = export(
            str(write_checkpoint(tmp_path / f"c{seed}", seed=seed)),
            tmp_path / f"a{seed}",
            variants=["cpu-fp32", "cpu-int8"],
            quantization=Quantization(calibration),
        )
        variant = manifest.variants["cpu-int8"]
        digests.add((variant.encoder_digest, variant.head_digest, variant.weight_bytes))
        encoder, _ = split(read_graph(tmp_path / f"a{seed}/model-int8.xml"))
        assert any(node.operator.endswith("FakeQuantize") for node in encoder.nodes)
    assert len(digests) == 1


def test_calibration_texts_are_excluded_from_the_gate() -> None:
    texts = [LabelledText("good"), LabelledText("bad")]
    assert excluding(texts, ["bad"]) == [LabelledText("good")]


def test_a_file_of_texts_is_read_with_labels_and_without_duplicates(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("good film\n\n  bad film \ngood film\n")
    assert read_texts(tmp_path / "t.txt", LABELS) == [
        LabelledText("good film"),
        LabelledText("bad film"),
    ]
    (tmp_path / "t.jsonl").write_text(
        '{"text": "a", "text_pair": "b", "label": "POSITIVE"}\n{"text": "a"}\n'
    )
    assert read_texts(tmp_path / "t.jsonl", LABELS) == [
        LabelledText(("a", "b"), "POSITIVE"),
        LabelledText("a"),
    ]


BAD_FILES = {
    "": "holds no text",
    "{": r"line 1 is not JSON",
    '{"text": "a", "colour": "red"}': "must be an object with a text",
    '{"text": 3}': "text is 3; it must be a string that is not empty",
    '{"label": "POSITIVE"}': "line 1 has no text",
    '{"text": "a", "label": "HAPPY"}': (
        r"label 'HAPPY' is not a label of the model \(NEGATIVE, POSITIVE\)"
    ),
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_file_of_texts_with_a_bad_line_is_refused_with_the_line(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(BadInput, match=BAD_FILES[content]):
        read_texts(tmp_path / "t.jsonl", LABELS)


def test_a_file_that_is_missing_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"none\.txt cannot be read"):
        read_texts(tmp_path / "none.txt", LABELS)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BadInput, match="is not UTF-8"):
        read_texts(tmp_path / "latin.txt", LABELS)


def test_an_agreement_that_is_not_a_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--agreement is 99.0; it must lie between 0 and 1"):
        main([str(write_checkpoint(tmp_path / "c")), str(tmp_path / "a"), "--agreement", "99"])


# By label


def test_a_rare_label_that_is_lost_is_reported_and_can_fail_the_gate(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    good, bad = (
        [item for item in sentences(12_000) if item.label == label] for label in LABELS[::-1]
    )
    texts = [*bad[:30], *good[:4_970]]
    # Batches are sorted by length, which is the same for all of these texts, so the first texts run
    # first and are flipped.
    gate = gate_of(artifact, texts, flips=20)
    assert gate.status == "passed"
    assert gate.agreement is not None
    rare = gate.agreement.labels["NEGATIVE"]
    assert (rare.texts, rare.agreeing) == (30, 10)
    assert "says little of labels with fewer than 50 texts: 'NEGATIVE' 30" in gate.reason
    strict = gate_of(artifact, texts, flips=20, required_per_label=0.9)
    assert strict.status == "failed"
    assert "least of 'NEGATIVE': 10 of 30, at least 19." in strict.reason


def test_every_label_has_its_own_bound(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    gate = gate_of(artifact, sentences(5_000), flips=0, required_per_label=0.99)
    assert gate.status == "passed"
    assert gate.agreement is not None
    assert {name: label.texts for name, label in gate.agreement.labels.items()} == {
        "NEGATIVE": 2_500,
        "POSITIVE": 2_500,
    }


# Files of texts


@pytest.mark.parametrize("content", ["\ufeffgood film\r\nbad film\r\n", "good film\nbad film"])
def test_a_byte_order_mark_and_carriage_returns_are_not_part_of_a_text(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "texts.txt").write_bytes(content.encode())
    assert [item.text for item in read_texts(tmp_path / "texts.txt", LABELS)] == [
        "good film",
        "bad film",
    ]


def test_a_unicode_separator_within_a_json_text_does_not_end_the_line(tmp_path: Path) -> None:
    (tmp_path / "texts.JSONL").write_text('{"text": "good\u2028film\x85"}\n', encoding="utf-8")
    assert [item.text for item in read_texts(tmp_path / "texts.JSONL", LABELS)] == [
        "good\u2028film\x85"
    ]


@pytest.mark.parametrize("name", ["texts.csv", "texts.json", "texts.tsv"])
def test_a_file_with_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,label\ngood,POSITIVE\n")
    with pytest.raises(
        BadInput, match=r"ends in '\.\w+'\. Use a \.txt file with one text per line"
    ):
        read_texts(tmp_path / name, LABELS)


def test_half_of_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    with pytest.raises(BadInput, match=r"line 2: text holds half of a surrogate pair"):
        read_texts(tmp_path / "texts.jsonl", LABELS)


def test_a_gate_without_an_int8_variant_or_with_calibration_texts_only_is_refused(
    tmp_path: Path,
) -> None:
    checkpoint, texts = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "texts.txt"
    texts.write_text("good film\nbad film\n")
    with pytest.raises(BadUsage, match="--gate judges int8 variants"):
        main([str(checkpoint), str(tmp_path / "a"), "--variants", "cpu-fp32", "--gate", str(texts)])
    with pytest.raises(BadInput, match="all of its texts are in the calibration file"):
        main(
            [
                str(checkpoint),
                str(tmp_path / "a"),
                "--calibration",
                str(texts),
                "--gate",
                str(texts),
            ]
        )


def test_int8_alone_is_built_with_the_fp32_that_it_is_compared_with(tmp_path: Path) -> None:
    main(
        [
            str(write_checkpoint(tmp_path / "checkpoint")),
            str(tmp_path / "artifact"),
            "--variants",
            " cpu-int8 ",
        ]
    )
    variants = read_artifact(tmp_path / "artifact").manifest.variants
    assert variants.keys() == {"cpu-fp32", "cpu-int8"}
    assert variants["cpu-fp32"].gate.status == "passed"


@pytest.mark.parametrize(("option", "limit"), [("--reduce-range", 64), ("--no-reduce-range", 128)])
def test_int8_weights_are_limited_to_seven_bits_if_eight_would_saturate(
    tmp_path: Path, option: str, limit: int
) -> None:
    import openvino as ov

    main(
        [
            str(write_checkpoint(tmp_path / "checkpoint")),
            str(tmp_path / "artifact"),
            "--variants",
            "cpu-int8",
            option,
        ]
    )
    graph = ov.Core().read_model(tmp_path / "artifact/model-int8.xml")
    weights = [
        node.data
        for node in graph.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i8
    ]
    # Embeddings are looked up and not summed, so they may have 8 bits.
    multiplied = [weight for weight in weights if min(weight.shape) >= HIDDEN]
    assert multiplied
    largest = max(int(np.abs(weight.astype(np.int32)).max()) for weight in multiplied)
    assert limit // 2 < largest <= limit
    provenance = read_artifact(tmp_path / "artifact").manifest.provenance
    assert ("int8_weights" in provenance) == (option == "--reduce-range")


def test_the_score_of_a_single_label_is_compared_as_a_number(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", labels=("POSITIVE",), activation="sigmoid")
    engine = OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1)
    fillers = map(" ".join, itertools.product(("a", "b", "c", "film"), repeat=7))
    texts = [
        LabelledText(f"{'good ' * (1 + number % 5)}{filler}")
        for number, filler in enumerate(itertools.islice(fillers, 5_000))
    ]
    exact = Classifier(artifact, engine)
    assert judge(exact, Classifier(artifact, engine), artifact, texts, 0.99).status == "passed"

    @dataclass
    class Constant(Flipping):
        def start(self, inputs: Inputs) -> Callable[[], Logits]:
            logits = self.inner.start(inputs)()
            return lambda: np.full_like(logits, 3.0)

    constant = Classifier(artifact, Constant(engine, 0))
    assert judge(exact, constant, artifact, texts, 0.99).status == "failed"


@pytest.mark.parametrize(
    ("native", "installed", "is_built"),
    [({"f32"}, True, True), ({"f32"}, False, False), ({"f32", "i8"}, True, False)],
)
def test_int8_by_onnx_runtime_is_built_where_openvinos_is_slow(
    native: set[str], installed: bool, is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "native_precisions", lambda: native)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert ("cpu-int8-ort" in gated_variants()) == is_built
    assert "cpu-int8" in gated_variants()
