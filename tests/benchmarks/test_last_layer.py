"""The benchmark of the last layer compares both graphs, and refuses what it cannot run."""

from __future__ import annotations

import pytest

from benchmarks.commands import main
from benchmarks.graphs import last_layer
from command import BadUsage
from service.artifact import Artifact


def test_every_batch_that_the_model_reads_has_a_row(
    artifact: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_layer, "FIRST_ID", 4)
    monkeypatch.setattr(last_layer, "LAST_ID", 10)  # ordinary words of the toy vocabulary
    assert main(["last_layer", str(artifact.directory), "--seconds", "0"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows] == [
        "| 1 text of 8 tokens",
        "| 1 of 16",
        "| 8 of 16",
        "| 32 of 16",
    ]
    assert all(row.endswith("| yes |") for row in rows)


def test_a_variant_that_is_not_there_is_refused(artifact: Artifact) -> None:
    with pytest.raises(BadUsage, match="OpenVINO can run cpu-fp32"):
        main(["last_layer", str(artifact.directory), "--variant", "cpu-int8"])
