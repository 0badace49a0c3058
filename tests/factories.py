"""
Small real inputs for tests: a tokenizer, an ONNX model whose logits can be added by hand, and an
artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from service.artifact import (
    MANIFEST,
    Artifact,
    Gate,
    Manifest,
    Parity,
    Probe,
    SelfCheck,
    Variant,
    read_artifact,
    sha256,
    with_checksum,
)

WORDS = ["good", "bad", "film", "a", "b", "c", "poison", "endless"]
WEIGHTS: Mapping[str, tuple[float, float]] = {
    "good": (0.0, 1.0),
    "bad": (1.0, 0.0),
    "poison": (float("nan"), 0.0),
    "endless": (float("inf"), 0.0),
}
"""What each word adds to the logits of NEGATIVE and POSITIVE; other words add nothing."""
MAX_TOKENS = 16
PROBE = Probe(text="good", text_pair=None, input_ids=[2, 4, 3], token_type_ids=[0, 0, 0])


def write_tokenizer(path: Path) -> None:
    """Write a WordPiece tokenizer of the WORDS and the special tokens."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(path))


def write_model(path: Path, labels: int = 2, labels_tokens: bool = False) -> None:
    """Write a bag of words: the logits are the sum over the tokens that the mask does not hide.

    With `labels_tokens` they are those of each token.
    """
    table = np.zeros((4 + len(WORDS), labels), np.float32)
    for word, weights in WEIGHTS.items():
        table[4 + WORDS.index(word)] = (weights * labels)[:labels]
    integers = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "length"])
        for n in ("input_ids", "attention_mask", "token_type_ids")
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], "/bert/embeddings/Gather"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], "/bert/Cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"], "/bert/Unsqueeze"),
        # Where, not Mul: NaN times zero is NaN, so Mul would not hide a masked one.
        helper.make_node("Cast", ["column"], ["real"], "/bert/Cast_1", to=TensorProto.BOOL),
        helper.make_node("Where", ["real", "embedded", "nothing"], ["unmasked"], "/bert/Where"),
        helper.make_node(
            "Cast", ["token_type_ids"], ["types"], "/bert/Cast_2", to=TensorProto.FLOAT
        ),
        helper.make_node("Identity", ["unmasked"], ["logits"], "/classifier/Identity")
        if labels_tokens
        else helper.make_node(
            "ReduceSum", ["unmasked", "axis"], ["logits"], "/classifier/ReduceSum", keepdims=0
        ),
    ]
    shape = ["batch", "length", labels] if labels_tokens else ["batch", labels]
    constants = {
        "table": table,
        "last": np.array([2]),
        "axis": np.array([1]),
        "nothing": np.zeros((), np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "bag",
        integers,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )


def write_tagger(folder: Path, **changes: Any) -> Artifact:
    """Write a model that labels the word `good` B-GOOD, and every other one O."""
    about: dict[str, Any] = {"task": "token_labels", "takes_pairs": False}
    return write_artifact(folder, ("O", "B-GOOD"), **(about | changes))


def write_artifact(
    folder: Path,
    labels: Sequence[str] = ("NEGATIVE", "POSITIVE"),
    files_as: Mapping[str, str] | None = None,
    **changes: Any,
) -> Artifact:
    """Write an artifact and read it back as the service does.

    `files_as` replaces the content of its files, `changes` fields of its manifest.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer.json")
    labels_tokens = changes.get("task") == "token_labels"
    write_model(folder / "model.onnx", len(labels), labels_tokens)
    good = [float(weight) for weight in (WEIGHTS["good"] * len(labels))[: len(labels)]]
    special = [0.0] * len(labels)
    for name, content in (files_as or {}).items():
        (folder / name).write_text(content, encoding="utf-8")
    parity = Parity(texts=1, max_probability_difference=0.0, tolerance=1e-4, label_agreement=1.0)
    variant = Variant(
        runtime="openvino",
        precision="f32",
        files=["model.onnx"],
        encoder_digest="e" * 64,
        head_digest="d" * 64,
        weight_bytes=96,
        parity=parity,
        gate=Gate(status="passed", reason="made by hand"),
        self_check=SelfCheck(
            logits={"f32": [special, good, special] if labels_tokens else [good]},
            tolerance=1e-3,
        ),
    )
    values: dict[str, Any] = {
        "schema_version": 3,
        "probes": [] if files_as else [PROBE],
        "name": folder.name,
        "family": "bag",
        "task": "single_label",
        "labels": list(labels),
        "takes_pairs": True,
        "max_tokens": MAX_TOKENS,
        "inputs": ["input_ids", "attention_mask", "token_type_ids"],
        "encoder_digest": "e" * 64,
        "head_digest": "d" * 64,
        "tokenizer_digest": sha256(folder / "tokenizer.json"),
        "parameters": 24,
        "flops_per_token": 0,
        "padding_safe": True,
        "dropped": None,
        "kept_decoder_layers": 0,
        "variants": {"cpu-fp32": variant},
        "provenance": {},
        "files": {name: sha256(folder / name) for name in ("model.onnx", "tokenizer.json")},
    }
    manifest = with_checksum(Manifest.model_validate({"seal": ""} | values | changes))
    (folder / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    return read_artifact(folder)
