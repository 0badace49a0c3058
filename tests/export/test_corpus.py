"""Every checkpoint of the corpus is answered over HTTP as transformers.pipeline answers it, alone
and in company, or refused with the right word.
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
from export.commands import export
from service.artifact import read_artifact
from tests.export.corpus import ROWS, VERSIONS, Row, table
from tests.requirements import TRANSFORMERS_5, transformers_5
from tests.service.http.test_routes import classify, client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

CORPUS = Path(__file__).with_name("corpus.py")
SAME = 1e-4
"""How far a score may be from the pipeline's."""

Corpora = Callable[[str], Path]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """The corpus as a version of transformers writes it, in a process of its own."""
    made: dict[str, Path] = {}

    def make(version: str) -> Path:
        if version not in made:
            made[version] = tmp_path_factory.mktemp(f"transformers-{version}")
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(TRANSFORMERS_5) if version == "5" else "",
            }
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(CORPUS), str(made[version])],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert f"by transformers {version}." in done.stdout
        return made[version]

    return make


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
    assert (folder / "checkpoint").is_dir(), f"transformers {version} cannot make it"
    if row.refused is not None:
        with pytest.raises(CommandError, match=re.escape(row.refused)) as refusal:
            export(str(folder / "checkpoint"), tmp_path / "artifact", variants=["cpu-fp32"])
        assert type(refusal.value) is not CommandError
        assert os.listdir(tmp_path) == []
        return
    export(str(folder / "checkpoint"), tmp_path / "artifact", variants=["cpu-fp32"])
    told = json.loads((folder / "answers.json").read_text())
    artifact = read_artifact(tmp_path / "artifact")
    wanted = [
        (text, answer)
        for text, answer in zip(told["texts"], told["answers"], strict=True)
        if answer is not None and (isinstance(text, str) or artifact.manifest.takes_pairs)
    ]
    assert len(wanted) >= row.answered
    async with client_of(artifact) as (client, _):
        together = (await classify(client, {"input": [text for text, _ in wanted]})).json()["data"]
        for (text, answer), beside in zip(wanted, together, strict=True):
            [alone] = (await classify(client, {"input": text})).json()["data"]
            for found in (alone, beside):
                scores = {one["label"]: one["score"] for one in found["scores"]}
                assert scores == pytest.approx(answer, abs=SAME), (
                    f"{text!r} is answered otherwise than by the pipeline"
                )


def test_the_docs_table_has_these_rows() -> None:
    assert table() in Path("docs/families.md").read_text()
