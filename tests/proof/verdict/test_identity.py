from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from export.pipeline import export
from graphs.subnormals import count_subnormal_weights
from proof.commands import main
from proof.verdict.identity import compare, describe, headline
from service.artifact import MANIFEST, read_manifest, sha256, with_checksum
from tests.export.factories import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks


def with_subnormals(checkpoint: Path, count: int) -> Path:
    tensors = {
        name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    tensors["bert.embeddings.word_embeddings.weight"].view(-1)[:count] = 1e-39
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


def unflushed(artifact: Path, count: int) -> None:
    """Puts subnormal weights into an artifact, as exporters of earlier versions left them."""
    graph = onnx.load(artifact / "model.onnx")
    [table] = [
        tensor
        for tensor in graph.graph.initializer
        if tensor.name == "bert.embeddings.word_embeddings.weight"
    ]
    values = numpy_helper.to_array(table).copy()
    values.reshape(-1)[:count] = 1e-39
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(graph, artifact / "model.onnx")
    manifest = read_manifest(artifact)
    files = manifest.files | {"model.onnx": sha256(artifact / "model.onnx")}
    (artifact / MANIFEST).write_text(
        with_checksum(manifest.model_copy(update={"files": files})).model_dump_json()
    )


def test_export_sets_subnormal_weights_to_zero_and_the_manifest_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = export(
        str(with_subnormals(write_checkpoint(tmp_path / "a"), 12)),
        tmp_path / "artifact",
        variants=["cpu-fp32"],
    )
    assert manifest.flushed_weights == 12
    assert count_subnormal_weights(tmp_path / "artifact" / "model.onnx") == 0
    assert "sets 12 subnormal weights to zero" in capsys.readouterr().out


def test_subnormal_weights_are_counted_and_are_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(str(write_checkpoint(tmp_path / "a")), tmp_path / "slow")
    unflushed(tmp_path / "slow", 12)
    export(str(write_checkpoint(tmp_path / "b", seed=1)), tmp_path / "twin")
    slow, twin = str(tmp_path / "slow"), str(tmp_path / "twin")
    result = compare(Path(slow), Path(twin))
    assert result["same"]
    counted = {name: variant["subnormal_weights"] for name, variant in result["variants"].items()}
    assert counted == {"cpu-fp32": [12, 0], "cpu-bf16": [0, 0]}
    capsys.readouterr()
    assert main(["identity", slow, twin]) == 0
    assert capsys.readouterr().out.endswith(
        "(cpu-fp32, cpu-bf16), 12 and 0 subnormal weights in cpu-fp32.\n"
    )
    assert main(["identity", twin, twin]) == 0
    assert capsys.readouterr().out.endswith("(cpu-fp32, cpu-bf16), no subnormal weights.\n")


def comparison(*differences: str, same_encoder: bool = True) -> dict[str, Any]:
    """A comparison with differences in these subjects."""
    items = [{"what": subject, "detail": "1 and 2"} for subject in differences]
    return {
        "a": "a",
        "b": "b",
        "same": not items,
        "same_encoder": same_encoder,
        "differences": items,
        "variants": {"cpu-fp32": {"subnormal_weights": [0, 3]}},
    }


@pytest.mark.parametrize(
    ("differences", "same_encoder", "words"),
    [
        (
            ["parameters", "labels", "cpu-fp32 weight_bytes", "cpu-fp32 head"],
            True,
            "encoder equal, head differs",
        ),
        (["tokenizer_digest", "cpu-fp32 head"], True, "encoder equal, head and more differ"),
        (
            ["tokenizer_digest", "max_tokens"],
            True,
            "encoder and head equal, max tokens and tokenizer not",
        ),
        (["cpu-fp32 encoder", "cpu-fp32 head"], False, "they do not do the same work"),
        ([], True, "the same work"),
    ],
)
def test_the_headline_of_a_comparison_has_few_words(
    differences: list[str], same_encoder: bool, words: str
) -> None:
    assert headline(comparison(*differences, same_encoder=same_encoder)) == words


def test_differences_are_listed_and_subnormal_weights_are_not_one() -> None:
    assert describe(comparison("parameters", "cpu-fp32 head")).splitlines() == [
        "different: a and b: encoder equal, head differs.",
        "  parameters: 1 and 2",
        "  cpu-fp32 head: 1 and 2",
        "  not a difference: 0 and 3 subnormal weights in cpu-fp32",
    ]
