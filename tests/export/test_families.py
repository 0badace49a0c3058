"""
Families of Hugging Face classifiers, each with its own kind of tokenizer, are exported and served.

test_corpus.py compares their answers with transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer

from command import Unavailable
from export.checkpoint.config import plain_functions
from export.pipeline import export
from service.artifact import read_artifact
from tests.export.corpus import BY_NAME, FAMILIES, MAX_TOKENS, Family, write_family
from tests.service.http.test_routes import classify, client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

CORPUS = [
    *Path("examples/texts/sentences.txt").read_text().splitlines(),
    "Ein Satz auf Deutsch, mit Umlauten: Übergröße, schön.",
    "¿Qué? – “quotes” 🙂",
] * 3
TEXTS = [
    "a charming and often affecting journey",
    "Übergröße 🙂!",
    "x",
    "no apparent joy " * 30,
    "x <pad> [PAD] y",
]
PAIR = {"text": "is the film any good?", "text_pair": "it is, often"}

PACKED_FAMILIES = ("BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT", "DistilBERT", "ELECTRA", "ALBERT")


def write_checkpoint(family: Family, folder: Path) -> Path:
    """Write a classifier of that family with random weights, as its trainer would."""
    with plain_functions():
        write_family(folder, family)
    return folder


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
async def test_a_family_answers_in_any_batch_as_alone(family: Family, tmp_path: Path) -> None:
    export(
        str(write_checkpoint(family, tmp_path / "checkpoint")),
        tmp_path / "artifact",
        variants=["cpu-fp32"],
    )
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.manifest.max_tokens == MAX_TOKENS
    texts = [*TEXTS, PAIR] if artifact.manifest.takes_pairs else TEXTS
    async with client_of(artifact) as (client, service):
        [loaded] = service.registry.loaded.values()
        assert (loaded.classifier.packing is not None) == (family.name in PACKED_FAMILIES)
        # Every text three times, between different neighbours, which fill several packed rows.
        answers = (await classify(client, {"input": [*texts, *texts[::-1], *texts]})).json()["data"]
        batched = (
            answers[: len(texts)],
            answers[len(texts) : 2 * len(texts)][::-1],
            answers[2 * len(texts) :],
        )
        alone = [(await classify(client, {"input": text})).json()["data"][0] for text in texts]
    tolerance = 1e-6 if artifact.manifest.padding_invariant else 1e-5
    for expected, *repeats in zip(alone, *batched, strict=True):
        for answer in repeats:
            assert answer["probs"] == pytest.approx(expected["probs"], abs=tolerance)
    assert [answer["truncated"] for answer in alone[:4]] == [False, False, False, True]


def test_the_docs_name_the_families_whose_texts_are_packed() -> None:
    assert f"of {', '.join(PACKED_FAMILIES[:-1])} and {PACKED_FAMILIES[-1]}" in " ".join(
        Path("docs/families.md").read_text().split()
    )


# Checkpoints of older trainers, without tokenizer.json


def assert_same_tokens(artifact: Path, expected: Any) -> None:
    """Assert that an artifact's tokenizer reads texts as a slow one of transformers does."""
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    assert [list(tokenizer.encode(text).ids) for text in CORPUS[:40]] == [
        expected(text)["input_ids"] for text in CORPUS[:40]
    ]


def test_a_vocabulary_alone_becomes_the_tokenizer_that_transformers_builds_from_it(
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(BY_NAME["BERT"], tmp_path / "checkpoint")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text(
        "".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.__getitem__))
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "model_max_length": MAX_TOKENS,
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": True,
            }
        )
    )
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    expected = transformers.BertTokenizer(str(folder / "vocab.txt"))
    assert_same_tokens(tmp_path / "artifact", expected)


def test_merges_alone_become_the_tokenizer_that_transformers_builds_from_them(
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(BY_NAME["RoBERTa"], tmp_path / "checkpoint")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{' '.join(merge)}\n" for merge in model["merges"])
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": MAX_TOKENS, "tokenizer_class": "RobertaTokenizer"})
    )
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    expected = transformers.RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert_same_tokens(tmp_path / "artifact", expected)


def test_a_sentencepiece_model_becomes_the_tokenizer_that_transformers_builds_from_it(
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(BY_NAME["ALBERT"], tmp_path / "checkpoint")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        vocab_size=rows,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece="<pad>",
        unk_piece="<unk>",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        user_defined_symbols=["[MASK]"],
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": MAX_TOKENS, "tokenizer_class": "AlbertTokenizer"})
    )
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    expected = transformers.AlbertTokenizer(str(folder / "spiece.model"))
    assert_same_tokens(tmp_path / "artifact", expected)


def test_a_checkpoint_without_any_tokenizer_is_refused_with_what_to_save(tmp_path: Path) -> None:
    folder = write_checkpoint(BY_NAME["BERT"], tmp_path / "checkpoint")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(Unavailable, match=r"has no tokenizer\.json"):
        export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
