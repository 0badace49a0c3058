"""An export answers as its checkpoint, holds no decoder, and refuses a broken checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from benchmarks.families import FAMILIES, REFERENCE
from benchmarks.families import write_checkpoint as write_family
from command import BadInput, BadUsage, CommandError, Unavailable
from export.checkpoint.loading import build_model, read_checkpoint
from export.commands import main
from export.pipeline import export
from graphs.canonical import split
from graphs.files import read_graph
from proof.verdict.identity import compare, headline
from service.artifact import read_artifact
from service.classifier import Classifier
from service.runtimes.auto import Choice, load
from tests.export.factories import HIDDEN, write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks


def classifier_of(folder: Path, variant: str = "cpu-fp32") -> Classifier:
    artifact = read_artifact(folder)
    return Classifier(artifact, load(artifact, Choice(variant, "openvino", "test"), threads=1))


def test_an_export_answers_as_the_training_model_does_and_holds_no_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert main([str(checkpoint), str(tmp_path / "artifact")]) == 0
    printed = capsys.readouterr().out
    assert "drops the drbert decoder: 2 layers" in printed

    artifact = read_artifact(tmp_path / "artifact")
    manifest = artifact.manifest
    tensors = load_file(checkpoint / "model.safetensors")
    decoder = {name: t for name, t in tensors.items() if name.startswith("pretraining_decoder.")}
    assert manifest.dropped is not None
    assert manifest.dropped.layers == 2
    assert manifest.dropped.parameters == sum(t.numel() for t in decoder.values())
    assert manifest.parameters == sum(
        t.numel() for name, t in tensors.items() if name not in decoder
    )
    encoder, head = split(read_graph(artifact.path("model.onnx")))
    layers = {node.name.split("/")[3] for node in encoder.nodes if "/layer." in node.name}
    assert layers == {"layer.0", "layer.1"}
    # Encoder and head together hold every weight of the model: embeddings too, and the head is
    # pooler and classifier.
    assert encoder.parameters + head.parameters == manifest.parameters

    classifier = classifier_of(tmp_path / "artifact")
    model = BertForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for text in ("good film", "bad", "a b c " * 30):
        encoded = classifier.encode(text)
        with torch.no_grad():
            expected = model(torch.tensor([encoded.ids])).logits.numpy()
        assert np.allclose(classifier.predict([encoded]), expected, atol=1e-4)


def test_both_variants_are_verified_and_their_parity_is_in_the_manifest(tmp_path: Path) -> None:
    manifest = export(str(write_checkpoint(tmp_path / "checkpoint")), tmp_path / "artifact")
    assert list(manifest.variants) == ["cpu-fp32", "cpu-bf16"]
    exact, reduced = manifest.variants.values()
    assert exact.gate.status == "passed"
    assert exact.parity is not None
    assert exact.parity.texts >= 16
    assert exact.parity.max_probability_difference < 1e-4
    if reduced.parity is None:
        # On a processor that cannot run bf16 at all, the variant stays unverified and its gate
        # closed.
        assert reduced.gate.reason.startswith("not verified")
    else:
        assert 0 < reduced.parity.max_probability_difference < 0.1
    assert reduced.weight_bytes * 2 == pytest.approx(exact.weight_bytes, rel=0.01)
    assert manifest.padding_invariant
    assert manifest.max_tokens == 24


def test_twins_have_one_digest_whatever_their_weights(tmp_path: Path) -> None:
    checkpoints: dict[str, dict[str, Any]] = {
        "trained": {"seed": 1},
        "zeros": {"fill": 0.0},
        "ones": {"fill": 1.0},
        "vanilla": {"decoder": False},
    }
    graphs = {}
    for name, options in checkpoints.items():
        manifest = export(
            str(write_checkpoint(tmp_path / name, **options)), tmp_path / f"{name}-artifact"
        )
        graphs[name] = {
            variant_name: (variant.encoder_digest, variant.head_digest, variant.weight_bytes)
            for variant_name, variant in manifest.variants.items()
        }
    assert graphs["trained"] == graphs["zeros"] == graphs["ones"] == graphs["vanilla"]
    result = compare(tmp_path / "vanilla-artifact", tmp_path / "trained-artifact")
    assert result["same"]


def test_a_kept_decoder_is_two_more_layers_and_its_answers_are_reported_as_meaningless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint"))
    export(checkpoint, tmp_path / "without")
    control = export(checkpoint, tmp_path / "with", keep_decoder=True)
    assert "its answers mean nothing" in capsys.readouterr().out
    assert control.kept_decoder_layers == 2
    assert control.dropped is None
    result = compare(tmp_path / "without", tmp_path / "with")
    assert not result["same"]
    details = " ".join(d["detail"] for d in result["differences"])
    assert "/bert/encoder/layer.2, /bert/encoder/layer.3" in details
    model = build_model(read_checkpoint(checkpoint), keep_decoder=True)
    tensors = load_file(Path(checkpoint) / "model.safetensors")
    weight = tensors["pretraining_decoder.layer.1.output.dense.weight"].float()
    assert torch.equal(model.state_dict()["bert.encoder.layer.3.output.dense.weight"], weight)


def test_a_design_without_layers_has_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="has no decoder layers that could be kept"):
        export(
            str(write_checkpoint(tmp_path / "c", decoder=False)),
            tmp_path / "artifact",
            keep_decoder=True,
        )


def test_an_encoder_alone_has_the_same_graph_as_a_hugging_face_model(tmp_path: Path) -> None:
    export(str(write_checkpoint(tmp_path / "c")), tmp_path / "artifact")
    encoder, head = split(read_graph(tmp_path / "artifact/model.onnx"))
    assert [node.name for node in head.nodes][-1] == "/classifier/Gemm"
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert encoder.flops_per_token() == 2 * linear


def test_electras_encoder_is_berts_and_its_head_is_its_own(tmp_path: Path) -> None:
    electra = next(family for family in FAMILIES if family.name == "ELECTRA")
    export(str(write_family(REFERENCE, tmp_path / "bert", seed=0)), tmp_path / "a")
    export(str(write_family(electra, tmp_path / "electra", seed=1)), tmp_path / "b")
    assert headline(compare(tmp_path / "a", tmp_path / "b")) == "encoder equal, head differs"


def test_a_model_with_one_sentence_type_reads_pairs_whatever_its_tokenizer_says(
    tmp_path: Path,
) -> None:
    roberta = next(family for family in FAMILIES if family.name == "RoBERTa")
    manifest = export(
        str(write_family(roberta, tmp_path / "c", seed=1)), tmp_path / "a", variants=["cpu-fp32"]
    )
    assert manifest.inputs == ["input_ids", "attention_mask"]
    assert manifest.takes_pairs
    assert manifest.variants["cpu-fp32"].gate.status == "passed"


def damage(folder: Path, defect: str) -> None:
    """Damage a checkpoint in one of the ways that BROKEN lists."""
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(weights)

    def with_fields(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))

    def with_tensors(**changes: torch.Tensor) -> None:
        save_file(
            tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}, weights
        )

    def without_tensors(prefix: str) -> None:
        save_file(
            {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)},
            weights,
        )

    pooler = tensors["bert.pooler.dense.weight"]
    actions: dict[str, Callable[[], object]] = {
        "no config": (folder / "config.json").unlink,
        "no json": lambda: (folder / "config.json").write_text("{"),
        "a pickle only": lambda: weights.rename(folder / "pytorch_model.bin"),
        "no tokenizer": tokenizer.unlink,
        "cut short": lambda: weights.write_bytes(weights.read_bytes()[:1000]),
        "a wrong shape": lambda: with_fields(intermediate_size=128),
        "a missing tensor": lambda: without_tensors("bert.pooler.dense.bias"),
        "no head": lambda: without_tensors("classifier"),
        "NaN": lambda: with_tensors(classifier__bias=torch.tensor([float("nan"), 0.0])),
        # Every pooled state is tanh(10) ≈ 1; their sum times the largest weights overflows fp32.
        "logits that overflow": lambda: with_tensors(
            bert__pooler__dense__weight=torch.zeros_like(pooler),
            bert__pooler__dense__bias=torch.full((len(pooler),), 10.0),
            classifier__weight=torch.full((2, HIDDEN), 3e38),
        ),
        "a broken tokenizer": lambda: tokenizer.write_text("{}"),
        "no heads": lambda: with_fields(num_attention_heads=0),
        "equal labels": lambda: with_fields(id2label={"0": "GOOD", "1": "GOOD"}),
        "an unknown family": lambda: with_fields(model_type="no-such-model"),
    }
    actions[defect]()


BROKEN: list[tuple[str, type[CommandError], str]] = [
    ("no config", Unavailable, "has no config.json"),
    ("no json", BadInput, "config.json is not JSON"),
    ("a pickle only", Unavailable, "pytorch_model.bin is a pickle and is never read"),
    ("no tokenizer", Unavailable, "has no tokenizer.json"),
    ("cut short", BadInput, "model.safetensors cannot be read"),
    ("a wrong shape", BadInput, r"has shape \[.*\], but its config.json requires \["),
    ("a missing tensor", BadInput, "lacks the tensor bert.pooler.dense.bias"),
    ("no head", BadInput, "has no classification head .*; fine-tune it first"),
    ("NaN", BadInput, "classifier.bias holds NaN"),
    ("logits that overflow", BadInput, "weights may overflow: The model answered NaN or infinity"),
    ("a broken tokenizer", BadInput, "tokenizer.json cannot be read"),
    ("no heads", BadInput, "describes no classifier that can be built"),
    ("equal labels", BadInput, "the classes 0 and 1 are both called 'GOOD'"),
    ("an unknown family", BadInput, "describes no classifier that can be built"),
]


@pytest.mark.parametrize(("defect", "error", "words"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_checkpoint_is_refused_by_name_and_leaves_nothing_behind(
    tmp_path: Path, defect: str, error: type[CommandError], words: str
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    damage(folder, defect)
    with pytest.raises(error, match=words):
        export(str(folder), tmp_path / "artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not exist"):
        export(str(tmp_path / "nowhere"), tmp_path / "artifact")


def test_a_misspelt_path_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was called")
    )
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoints/reviews")
    with pytest.raises(
        Unavailable, match="checkpoint/review does not exist; did you mean checkpoints/reviews"
    ):
        export("checkpoint/review", tmp_path / "artifact")


def test_a_folder_that_is_not_an_artifact_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(BadUsage, match=r"mine holds thesis\.txt, which belongs to no artifact"):
        export(str(write_checkpoint(tmp_path / "c")), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_a_folder_that_holds_an_artifact_and_more_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "c"))
    export(checkpoint, tmp_path / "mine")
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(BadUsage, match=r"mine holds thesis\.txt, which belongs to no artifact"):
        export(checkpoint, tmp_path / "mine")
    (tmp_path / "mine/thesis.txt").unlink()
    export(checkpoint, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "mine"]


def test_padding_invariance_is_measured_on_fp32_whatever_is_built(tmp_path: Path) -> None:
    assert export(
        str(write_checkpoint(tmp_path / "c")), tmp_path / "a", variants=["cpu-bf16"]
    ).padding_invariant


def test_an_unknown_variant_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="known are cpu-fp32, cpu-bf16"):
        main(["c", str(tmp_path / "a"), "--variants", "cpu-int3"])
