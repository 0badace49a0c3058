"""Answers without a server: those of the service, one text at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from command import BadInput
from service.plain.__main__ import main
from tests.factories import write_artifact


def test_texts_are_answered_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_artifact(tmp_path / "artifact")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(["good", "bad bad", ""])))
    assert main([str(tmp_path / "artifact")]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert answered["variant"] == "cpu-fp32"
    assert answered["labels"] == ["NEGATIVE", "POSITIVE"]
    positive = [scores[1] for scores in answered["scores"]]
    assert positive == pytest.approx([0.731, 0.119, 0.5], abs=0.001)


def test_an_input_that_is_no_list_of_texts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("good"))
    with pytest.raises(BadInput, match="no JSON list of texts"):
        main([str(tmp_path)])
