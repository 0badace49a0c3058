"""The benchmark of engines compares what this processor can run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.commands import main
from benchmarks.graphs import engines, last_layer
from command import Unavailable
from service.artifact import Artifact


@pytest.fixture(autouse=True)
def toy_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "FIRST_ID", 4)
    monkeypatch.setattr(last_layer, "LAST_ID", 10)  # ordinary words of the toy vocabulary


def test_each_batch_is_run_by_every_engine(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "engines.md"
    command = ["engines", str(artifact.directory), "--seconds", "0", "--out", str(page)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| batch | cpu-fp32 by openvino, ms | cpu-fp32 by onnxruntime |" in printed
    rows = re.findall(r"^\| (.+?) \| [\d.]+ \| [\d.]+ \([\d.]+–[\d.]+\) \|$", printed, re.M)
    assert rows == ["1 text of 8 tokens", "1 of 16", "8 of 16", "32 of 16"]
    assert "python -m benchmarks engines" in page.read_text()


def test_one_engine_is_nothing_to_compare(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "PAIRS", engines.PAIRS[:1])
    with pytest.raises(Unavailable, match="can be run by cpu-fp32 by openvino here"):
        main(["engines", str(artifact.directory)])
