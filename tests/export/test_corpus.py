"""
Every checkpoint of the corpus is answered as by transformers.pipeline, or refused by its reason.

Texts are sent over HTTP, alone and in a batch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import CommandError
from export.pipeline import export
from service.artifact import read_artifact
from tests.export.corpus import ROWS, VERSIONS, Row, table
from tests.requirements import TRANSFORMERS_5, transformers_5
from tests.service.http.test_routes import classify, client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

CORPUS = Path(__file__).with_name("corpus.py")
TOLERANCE = 1e-4
"""Largest difference of a score from the pipeline's."""

Corpora = Callable[[str], Path]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """Return a function that writes the corpus with a version of transformers, in a subprocess."""
    folders: dict[str, Path] = {}

    def write_corpus(version: str) -> Path:
        if version not in folders:
            folders[version] = tmp_path_factory.mktemp(f"transformers-{version}")
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(TRANSFORMERS_5) if version == "5" else "",
            }
            process = subprocess.run(
                [sys.executable, "-W", "ignore", str(CORPUS), str(folders[version])],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert process.returncode == 0, process.stderr
            assert f"by transformers {version}." in process.stdout
        return folders[version]

    return write_corpus


def cases() -> list[Any]:
    marks = {"5": transformers_5}
    return [
        pytest.param(version, row, id=f"{row.name} ({version})", marks=marks.get(version, ()))
        for version in VERSIONS
        for row in ROWS
        if version in row.versions
    ]


@pytest.mark.parametrize(("version", "row"), cases())
async def test_a_checkpoint_is_answered_as_the_pipeline_answers_it_or_refused(
    version: str, row: Row, corpora: Corpora, tmp_path: Path
) -> None:
    folder = corpora(version) / f"{ROWS.index(row):02}"
    assert (folder / "checkpoint").is_dir(), f"transformers {version} cannot write it"
    if row.refused is not None:
        with pytest.raises(CommandError, match=re.escape(row.refused)) as refusal:
            export(str(folder / "checkpoint"), tmp_path / "artifact", variants=["cpu-fp32"])
        assert type(refusal.value) is not CommandError
        assert os.listdir(tmp_path) == []
        return
    export(str(folder / "checkpoint"), tmp_path / "artifact", variants=["cpu-fp32"])
    pipeline = json.loads((folder / "answers.json").read_text())
    artifact = read_artifact(tmp_path / "artifact")
    expected = [
        (text, scores)
        for text, scores in zip(pipeline["texts"], pipeline["answers"], strict=True)
        if scores is not None and (isinstance(text, str) or artifact.manifest.takes_pairs)
    ]
    assert len(expected) >= row.answered
    async with client_of(artifact) as (client, _):
        response = await classify(client, {"input": [text for text, _ in expected]})
        for (text, scores), batched in zip(expected, response.json()["data"], strict=True):
            [alone] = (await classify(client, {"input": text})).json()["data"]
            for answer in (alone, batched):
                answered = {label["label"]: label["score"] for label in answer["scores"]}
                assert answered == pytest.approx(scores, abs=TOLERANCE), (
                    f"the pipeline answers {text!r} differently"
                )


def test_the_table_in_the_docs_has_these_rows() -> None:
    assert table() in Path("docs/families.md").read_text()
