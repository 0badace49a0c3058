"""
Fields of a checkpoint's files are applied, translated or refused.

test_corpus.py compares the answers with transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import BadInput
from export.checkpoint.config import read_config
from export.pipeline import export
from service.artifact import read_artifact
from tests.export.corpus import BY_NAME, edit_json
from tests.export.test_families import write_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

MODERNBERT_OF_5 = {
    "model_type": "modernbert",
    "num_hidden_layers": 4,
    "transformers_version": "5.24.0",
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_theta": 80_000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 20_000.0, "rope_type": "default"},
    },
}


def test_fields_that_transformers_5_renamed_are_translated(tmp_path: Path) -> None:
    config = read_config(tmp_path, MODERNBERT_OF_5)
    assert (
        config.global_rope_theta,
        config.local_rope_theta,
        config.global_attn_every_n_layers,
    ) == (80_000.0, 20_000.0, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "layer_types does not have full_attention in every n-th layer",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1.0, "rope_type": "yarn", "factor": 4.0}
                }
            },
            "with the rope_type default",
        ),
        (
            {"swirl": 1},
            "has the field swirl = 1, which transformers .* does not know for modernbert",
        ),
    ],
)
def test_a_field_that_cannot_be_translated_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        read_config(tmp_path, MODERNBERT_OF_5 | changes)


def test_an_ignored_field_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(BY_NAME["BERT"], tmp_path / "checkpoint")
    edit_json(folder, "config.json", my_note="of last spring")
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    assert "ignores my_note, which transformers does not know for bert" in capsys.readouterr().out


def test_the_truncation_side_of_a_checkpoint_is_in_its_manifest(tmp_path: Path) -> None:
    folder = write_checkpoint(BY_NAME["BERT"], tmp_path / "checkpoint")
    edit_json(folder, "tokenizer_config.json", truncation_side="left")
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    manifest = json.loads((tmp_path / "artifact/manifest.json").read_text())
    assert (manifest["truncation_side"], manifest["activation"]) == ("left", None)
    assert read_artifact(tmp_path / "artifact").manifest.truncation_side == "left"
