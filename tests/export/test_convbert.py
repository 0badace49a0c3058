"""An exported ConvBERT answers as transformers does, whatever the padding of a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ConvBertConfig, ConvBertForSequenceClassification

from export.graph.attention import with_export_attention
from export.graph.convbert import band
from export.pipeline import export
from graphs.canonical import split
from graphs.files import read_graph
from service.artifact import read_artifact
from service.classifier import Classifier
from service.runtimes.auto import Choice, load
from tests.factories import write_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks


def classifier(**changes: object) -> ConvBertForSequenceClassification:
    config = {
        "vocab_size": 12,
        "hidden_size": 32,
        "embedding_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_kernel_size": 5,
        "max_position_embeddings": 48,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "num_labels": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    return ConvBertForSequenceClassification(ConvBertConfig(**{**config, **changes})).eval()


def by_places(kernels: Tensor) -> Tensor:
    """Return the band matrix, set entry by entry."""
    batch, heads, length, span = kernels.shape
    placed = torch.zeros(batch, heads, length, length)
    for i in range(length):
        for j in range(span):
            if 0 <= (column := i + j - span // 2) < length:
                placed[:, :, i, column] = kernels[:, :, i, j]
    return placed


@pytest.mark.parametrize(("length", "span"), [(1, 9), (3, 9), (4, 3), (40, 9), (7, 1)])
def test_each_kernel_lies_along_the_diagonal(length: int, span: int) -> None:
    kernels = torch.randn(2, 3, length, span)
    assert torch.equal(band(kernels, length), by_places(kernels))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 9}, {"num_attention_heads": 8}])
def test_a_text_without_padding_is_answered_as_by_transformers(changes: dict[str, object]) -> None:
    original = classifier(**changes)
    exported = with_export_attention(original)
    assert exported is not original
    for length in (1, 3, 20):
        ids = torch.randint(1, 12, (2, length))
        for mask in (None, torch.ones_like(ids)):
            assert torch.allclose(exported(ids, mask).logits, original(ids, mask).logits, atol=1e-5)


@torch.no_grad()
def test_padding_changes_the_answer_of_transformers_and_not_the_exported_one() -> None:
    original = classifier()
    ids = torch.randint(1, 12, (1, 9))
    padded_ids = torch.nn.functional.pad(ids, (0, 7))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 7))
    for model, invariant in ((original, False), (with_export_attention(original), True)):
        alone = model(ids, torch.ones_like(ids)).logits
        padded = model(padded_ids, mask).logits
        assert torch.allclose(alone, padded, atol=1e-5) == invariant


def test_an_exported_convbert_is_padding_invariant_and_runs_in_batches(tmp_path: Path) -> None:
    model = classifier()
    (tmp_path / "checkpoint").mkdir()
    write_tokenizer(tmp_path / "checkpoint/tokenizer.json")
    model.config.save_pretrained(tmp_path / "checkpoint")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "checkpoint/model.safetensors",
    )
    manifest = export(str(tmp_path / "checkpoint"), tmp_path / "artifact", variants=["cpu-fp32"])
    assert manifest.padding_invariant
    encoder, head = split(read_graph(tmp_path / "artifact/model.onnx"))
    assert (
        encoder.parameters + head.parameters
        == manifest.parameters
        == sum(p.numel() for p in model.parameters())
    )

    artifact = read_artifact(tmp_path / "artifact")
    served = Classifier(artifact, load(artifact, Choice("cpu-fp32", "openvino", "test"), threads=1))
    texts = ["good", "bad film a b c a b c a b c", "good film", "a b c " * 12]
    encoded = [served.encode(text) for text in texts]
    logits = served.predict(encoded)
    for item, row in zip(encoded, logits, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([item.ids])).logits.numpy()[0]
        assert np.allclose(row, expected, atol=1e-4)


def test_a_model_without_such_attention_is_returned_itself() -> None:
    other = torch.nn.Linear(2, 2)
    assert with_export_attention(other) is other
