"""The gate of an int8 variant: counted agreement with fp32, over texts that calibration has not
seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from command import BadInput, BadUsage, CommandError, Unavailable
from export.checks.gate import judge, lower_bound
from export.commands import Quantization, export, main
from export.texts import SHIPPED, Labelled, read_texts, without
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


def gate_of(
    artifact: Artifact,
    texts: list[Labelled],
    flips: int,
    wanted: float = 0.99,
    wanted_per_label: float | None = None,
) -> Gate:
    engine = OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1)
    return judge(
        Classifier(artifact, engine),
        Classifier(artifact, Flipping(engine, flips)),
        artifact,
        texts,
        wanted,
        wanted_per_label=wanted_per_label,
    )


def sentences(count: int) -> list[Labelled]:
    """Distinct texts, each with one good or one bad word and so with a label."""
    fillers = itertools.product(("a", "b", "c", "film"), repeat=7)
    return [
        Labelled(f"{word} {' '.join(rest)}", label)
        for rest in itertools.islice(fillers, count // 2)
        for word, label in (("bad", LABELS[0]), ("good", LABELS[1]))
    ]


@pytest.mark.parametrize(("agreeing", "texts"), [(5000, 5000), (4950, 5000), (1, 10)])
def test_were_the_share_at_the_bound_so_much_agreement_would_be_seen_once_in_twenty_times(
    agreeing: int, texts: int
) -> None:
    assert stats.binom.sf(agreeing - 1, texts, lower_bound(agreeing, texts)) == pytest.approx(0.05)


def test_where_nothing_agrees_the_bound_is_nothing() -> None:
    assert lower_bound(0, 10) == 0


def test_a_variant_passes_if_the_bound_of_its_agreement_reaches_what_was_asked(
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


def test_few_texts_cannot_open_the_gate_however_well_they_agree(tmp_path: Path) -> None:
    gate = gate_of(write_artifact(tmp_path / "artifact"), sentences(4000), flips=0)
    assert gate.status == "failed"
    assert "over at least 5,000 texts" in gate.reason


def test_an_int8_export_without_gate_texts_is_ungated_and_answers_nearly_as_fp32_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert (
        main([str(checkpoint), str(tmp_path / "artifact"), "--variants", "cpu-fp32,cpu-int8"]) == 0
    )
    printed = capsys.readouterr().out
    assert "calibrating with 89 texts of those that come along" in printed
    assert (
        "cpu-int8: ungated: no texts to gate it with; give --gate FILE with at least 5,000"
        in printed
    )


def test_int8_is_served_in_no_lower_precision_than_its_gate_was_passed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not quantise would run in bf16 on a processor that has it, and the gate vouch
    for something else.
    """
    calibration, gate = tmp_path / "calibration.txt", tmp_path / "gate.txt"
    calibration.write_text("good film\nbad film\n")
    gate.write_text("a good film\na bad film\n")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    manifest = export(
        str(checkpoint),
        tmp_path / "artifact",
        variants=["cpu-fp32", "cpu-int8"],
        quantization=Quantization(calibration, gate),
    )
    agreement = manifest.variants["cpu-int8"].gate.agreement
    assert agreement is not None
    assert agreement.rest == ("bf16" if "bf16" in cpus.native_precisions() else "f32")

    artifact = read_artifact(tmp_path / "artifact")
    for passed_in, native, expected in (
        ("f32", {"f32", "bf16", "i8"}, "f32"),
        ("bf16", {"f32", "i8"}, "f32"),
        ("f32", {"f32", "i8"}, "f32"),
    ):
        monkeypatch.setattr(cpus, "native_precisions", lambda native=native: native)
        held = artifact.manifest.variants["cpu-int8"]
        gated = held.model_copy(
            update={
                "gate": held.gate.model_copy(
                    update={"agreement": agreement.model_copy(update={"rest": passed_in})}
                )
            }
        )
        changed = Artifact(
            artifact.directory,
            artifact.manifest.model_copy(
                update={"variants": artifact.manifest.variants | {"cpu-int8": gated}}
            ),
        )
        runtime = load(changed, Choice("cpu-int8", "openvino", "test"), 1)
        assert isinstance(runtime, OpenVinoRuntime)
        assert runtime.rest == expected


def test_twins_have_one_int8_digest_whatever_their_weights_and_texts(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("good film\nbad film\na b c\n")
    digests = set()
    for seed, calibration in ((1, SHIPPED), (2, tmp_path / "own.txt")):
        manifest = export(
            str(write_checkpoint(tmp_path / f"c{seed}", seed=seed)),
            tmp_path / f"a{seed}",
            variants=["cpu-fp32", "cpu-int8"],
            quantization=Quantization(calibration),
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
    (tmp_path / "t.jsonl").write_text(
        '{"text": "a", "text_pair": "b", "label": "POSITIVE"}\n{"text": "a"}\n'
    )
    assert read_texts(tmp_path / "t.jsonl", LABELS) == [
        Labelled(("a", "b"), "POSITIVE"),
        Labelled("a"),
    ]


BAD_FILES = {
    "": "holds no text",
    "{": r"line 1 is not JSON",
    '{"text": "a", "colour": "red"}': "must be an object with text",
    '{"text": 3}': "text is 3; it must be a string that is not empty",
    '{"label": "POSITIVE"}': "line 1 has no text",
    '{"text": "a", "label": "HAPPY"}': (
        r"label 'HAPPY' is none of the model's \(NEGATIVE, POSITIVE\)"
    ),
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_file_of_texts_that_cannot_be_used_is_refused_by_its_line(
    content: str, tmp_path: Path
) -> None:
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


# By label


def test_a_rare_label_that_is_lost_shows_and_can_be_demanded(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    good, bad = (
        [item for item in sentences(12_000) if item.label == label] for label in LABELS[::-1]
    )
    texts = [*bad[:30], *good[:4_970]]
    # The batches are sorted by length, which all of these have in common: the first ones that are
    # run are flipped.
    tolerated = gate_of(artifact, texts, flips=20)
    assert tolerated.status == "passed"
    assert tolerated.agreement is not None
    rare = tolerated.agreement.labels["NEGATIVE"]
    assert (rare.texts, rare.agreeing) == (30, 10)
    assert "says little of labels with fewer than 50 texts: 'NEGATIVE' 30" in tolerated.reason
    demanded = gate_of(artifact, texts, flips=20, wanted_per_label=0.9)
    assert demanded.status == "failed"
    assert "least of 'NEGATIVE': 10 of 30, at least 19." in demanded.reason


def test_every_label_has_its_own_bound(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    gate = gate_of(artifact, sentences(5_000), flips=0, wanted_per_label=0.99)
    assert gate.status == "passed"
    assert gate.agreement is not None
    assert {label: one.texts for label, one in gate.agreement.labels.items()} == {
        "NEGATIVE": 2_500,
        "POSITIVE": 2_500,
    }


# Files of texts


@pytest.mark.parametrize("content", ["\ufeffgood film\r\nbad film\r\n", "good film\nbad film"])
def test_marks_and_line_ends_of_other_systems_are_no_part_of_a_text(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "texts.txt").write_bytes(content.encode())
    assert [item.text for item in read_texts(tmp_path / "texts.txt", LABELS)] == [
        "good film",
        "bad film",
    ]


def test_a_separator_within_a_json_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "texts.JSONL").write_text('{"text": "good\u2028film\x85"}\n', encoding="utf-8")
    assert [item.text for item in read_texts(tmp_path / "texts.JSONL", LABELS)] == [
        "good\u2028film\x85"
    ]


@pytest.mark.parametrize("name", ["texts.csv", "texts.json", "texts.tsv"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,label\ngood,POSITIVE\n")
    with pytest.raises(BadInput, match=r"ends in \.txt, \.jsonl, and has a text a line"):
        read_texts(tmp_path / name, LABELS)


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    with pytest.raises(BadInput, match=r"line 2: text holds half a surrogate pair"):
        read_texts(tmp_path / "texts.jsonl", LABELS)


def test_a_gate_for_nothing_and_a_gate_of_the_calibrations_texts_are_refused(
    tmp_path: Path,
) -> None:
    checkpoint, texts = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "texts.txt"
    texts.write_text("good film\nbad film\n")
    with pytest.raises(BadUsage, match="--gate is for variants in 8 bits"):
        main([str(checkpoint), str(tmp_path / "a"), "--variants", "cpu-fp32", "--gate", str(texts)])
    with pytest.raises(BadInput, match="every text of it is among those of the calibration"):
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


def test_int8_alone_comes_with_the_fp32_that_it_is_held_against(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("option", "most"), [("--reduce-range", 64), ("--no-reduce-range", 128)])
def test_int8_weights_keep_to_seven_bits_where_eight_would_saturate(
    tmp_path: Path, option: str, most: int
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
    # Embeddings are looked up, not added.
    multiplied = [weight for weight in weights if min(weight.shape) >= HIDDEN]
    assert multiplied
    largest = max(int(np.abs(weight.astype(np.int32)).max()) for weight in multiplied)
    assert most // 2 < largest <= most
    provenance = read_artifact(tmp_path / "artifact").manifest.provenance
    assert ("int8_weights" in provenance) == (option == "--reduce-range")


def test_the_score_of_a_single_label_has_to_stay_near_as_a_number_has_to(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", labels=("POSITIVE",), activation="sigmoid")
    engine = OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1)
    texts = [
        Labelled(f"{'good ' * (1 + number % 5)}{word}")
        for number, word in enumerate(
            itertools.islice(
                map(" ".join, itertools.product(("a", "b", "c", "film"), repeat=7)), 5_000
            )
        )
    ]
    assert (
        judge(
            Classifier(artifact, engine), Classifier(artifact, engine), artifact, texts, 0.99
        ).status
        == "passed"
    )

    @dataclass
    class Constant(Flipping):
        def start(self, inputs: Inputs) -> Callable[[], Logits]:
            logits = self.inner.start(inputs)()
            return lambda: np.full_like(logits, 3.0)

    assert (
        judge(
            Classifier(artifact, engine),
            Classifier(artifact, Constant(engine, 0)),
            artifact,
            texts,
            0.99,
        ).status
        == "failed"
    )
