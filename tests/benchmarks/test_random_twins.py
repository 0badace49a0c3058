from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.commands import main
from service.artifact import read_artifact

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks


def test_random_twins_do_the_same_work_with_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["random_twins", str(tmp_path), "--size", "tiny"]) == 0
    assert "do the same work" in capsys.readouterr().out
    bert, drbert = (read_artifact(tmp_path / name).manifest for name in ("bert", "drbert"))
    assert bert.encoder_digest == drbert.encoder_digest
    assert bert.files["model.onnx"] != drbert.files["model.onnx"]
