from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.commands import main
from benchmarks.graphs.subnormals import count
from command import Unavailable
from service.artifact import MANIFEST, Artifact, read_artifact, sha256, with_checksum
from service.classifier import Classifier
from service.runtimes.openvino import OpenVinoRuntime


def with_subnormals(artifact: Artifact) -> Artifact:
    """The word `c` adds a subnormal number to both logits."""
    path = artifact.path("model.onnx")
    model = onnx.load(path)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    values = numpy_helper.to_array(table).copy()
    values[9] = 1e-39
    table.CopyFrom(numpy_helper.from_array(values, "table"))
    onnx.save(model, path)
    files = artifact.manifest.files | {"model.onnx": sha256(path)}
    (artifact.directory / MANIFEST).write_text(
        with_checksum(artifact.manifest.model_copy(update={"files": files})).model_dump_json()
    )
    return read_artifact(artifact.directory)


def test_what_an_artifact_computes_is_counted_node_by_node(artifact: Artifact) -> None:
    counted = count(with_subnormals(artifact), ["c", "good", "c c"])
    # Looked up, kept under the mask and added: two labels each, for one `c` and for two.
    assert {name: number for name, number in counted.subnormals.items() if number} == {
        "/bert/embeddings/Gather": 6,
        "/bert/Where": 6,
        "/classifier/ReduceSum": 4,
    }
    assert count(artifact, ["good"]).subnormals.total() == 0


def test_counting_computes_what_serving_computes(artifact: Artifact) -> None:
    counting = Classifier(artifact, count(artifact, ["good"]))
    serving = Classifier(artifact, OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1))
    for text in ("good film", "bad", "a b c"):
        assert np.allclose(
            counting.predict([counting.encode(text)]), serving.predict([serving.encode(text)])
        )


def test_the_table_has_a_row_for_each_artifact(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("c\ngood\n")
    with_subnormals(artifact)
    assert (
        main(
            [
                "subnormals",
                str(artifact.directory),
                str(artifact.directory),
                "--texts",
                str(tmp_path / "texts.txt"),
            ]
        )
        == 0
    )
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2
    assert rows[0].split(" | ")[2] == "2"
    assert rows[0].split(" | ")[4] == "6"


def test_texts_that_are_nowhere_are_named(artifact: Artifact) -> None:
    with pytest.raises(Unavailable, match=r"nowhere\.txt does not exist"):
        main(["subnormals", str(artifact.directory), "--texts", "nowhere.txt"])
