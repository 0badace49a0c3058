"""Tokenizers that would exhaust memory or time are refused when they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.artifact import ArtifactError
from service.tokenization.limits import check_tokenizer, read_tokenizer
from tests.factories import write_artifact, write_tokenizer


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    write_tokenizer(tmp_path / "tokenizer.json")
    values: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    return values


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def added(content: str, **more: Any) -> dict[str, Any]:
    return {
        "id": 99,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    } | more


COSTLY = [
    {"normalizer": replacing({"String": "a"}, "b" * 1000)},
    {
        "normalizer": sequence(
            replacing({"String": "a"}, "b" * 30), replacing({"Regex": "b"}, "c" * 30)
        )
    },
    {"normalizer": sequence(*[replacing({"Regex": "x*"}, "y")] * 30)},
    {"normalizer": sequence(*[replacing({"Regex": "(?=a)"}, "a")] * 30)},
    {"normalizer": sequence(sequence(*[replacing({"Regex": ""}, "a")] * 30))},
    {"pre_tokenizer": replacing({"String": "a"}, "b" * 1000)},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 5_000_000}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "x" * 5_000_000}},
    {"added_tokens": [added("ab" * 500_000)]},
    {"added_tokens": [added(f"t{i}") for i in range(30_000)]},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50_000,
        }
    },
]


@pytest.mark.parametrize("changes", COSTLY)
def test_an_expensive_tokenizer_is_refused_wherever_the_cost_is(
    values: dict[str, Any], changes: dict[str, Any]
) -> None:
    for order in (
        values | changes,
        {"model": None} | values | changes,
        {"version": "1.0", "model": values["model"]} | values | changes,
    ):
        for ascii_only in (True, False):
            with pytest.raises(ValueError, match="the limit is"):
                check_tokenizer(json.dumps(order, ensure_ascii=ascii_only).encode())
    hidden = (
        json.dumps(values | changes)
        .replace('"normalizer"', '"normali\\u007aer"')
        .replace('"added_tokens"', '"added\\u005ftokens"')
    )
    with pytest.raises(ValueError, match="the limit is"):
        check_tokenizer(hidden.encode())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalizer": None},
        {"added_tokens": [added("[NEW]"), added('"model"'), added("normalizer")]},
        # ALBERT's, and a tokenizer's that cleans its text.
        {
            "normalizer": sequence(
                replacing({"String": "``"}, '"'),
                replacing({"String": "''"}, '"'),
                {"type": "Lowercase"},
            )
        },
        {
            "normalizer": sequence(
                *[replacing({"Regex": " {2,}"}, " ")] * 20,
                *[replacing({"Regex": "[^a-z]+"}, " ")] * 5,
            )
        },
        {
            "model": {
                "type": "WordPiece",
                "vocab": {"normalizer": 0, "added_tokens": 1, "model": 2, "\u00e9": 3},
            }
        },
    ],
)
def test_ordinary_tokenizers_pass(values: dict[str, Any], changes: dict[str, Any]) -> None:
    check_tokenizer(json.dumps(values | changes).encode())


@pytest.mark.parametrize(
    "content", ["[]", "null", "", "{", "[" * 100_000, '{"normalizer": ' + "[" * 100_000]
)
def test_a_file_that_is_not_a_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    artifact = write_artifact(tmp_path / "broken", files_as={"tokenizer.json": content})
    with pytest.raises(ArtifactError, match=r"broken/tokenizer\.json cannot be used: "):
        read_tokenizer(artifact)
