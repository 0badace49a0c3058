"""
Families of Hugging Face classifiers, each with its own kind of tokenizer: what is served is what transformers computes.

The rows here are the rows of docs/families.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from command import BadInput, Unavailable
from export.checkpoint import plain_functions
from export.commands import export
from service.artifact import read_artifact
from tests.service.test_routes import classify, client_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's tracer and optimum warn of what verification checks

CORPUS = [*Path("examples/texts/sentences.txt").read_text().splitlines(), "Ein Satz auf Deutsch, mit Umlauten: Übergröße, schön.", "¿Qué? – “quotes” 🙂"] * 3
TEXTS = ["a charming and often affecting journey", "Übergröße 🙂!", "x", "no apparent joy " * 30, "x <pad> [PAD] y"]
PAIR = {"text": "is the film any good?", "text_pair": "it is, often"}
MAX_TOKENS = 48

Specials = Sequence[str]
"""What stands for padding, an unknown word, the beginning and the end; their ids are their places in `order`."""


def trained(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece(order: Specials, unknown: str) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(order), show_progress=False)
    return trained(models.WordPiece(unk_token=unknown), trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(lowercase=True))


def byte_level_bpe(order: Specials, unknown: str) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(order), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made = trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece_unigram(order: Specials, unknown: str) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=list(order), unk_token=unknown, show_progress=False)
    spaces = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), spaces)


@dataclass(frozen=True)
class Family:
    name: str
    architecture: str
    tokenizer: Callable[[Specials, str], Tokenizer]
    order: Specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    pair: str = "{b} $A {e} $B:1 {e}:1"
    config: Mapping[str, Any] = field(default_factory=dict)
    shares_rows: bool = False

    @property
    def special(self) -> dict[str, str]:
        if "<s>" in self.order:
            return {"pad": "<pad>", "unk": "<unk>" if "<unk>" in self.order else "[UNK]", "b": "<s>", "e": "</s>"}
        return {"pad": "[PAD]" if "[PAD]" in self.order else "<pad>", "unk": "[UNK]" if "[UNK]" in self.order else "<unk>", "b": "[CLS]", "e": "[SEP]"}


ROBERTAS = {"order": ("<s>", "<pad>", "</s>", "<unk>"), "pair": "{b} $A {e} {e} $B {e}"}
POSITIONS_AFTER_PADDING = {"max_position_embeddings": 226, "type_vocab_size": 1}    # rows may be longer than texts
FAMILIES = [
    Family("BERT", "Bert", wordpiece, shares_rows=True),
    Family("RoBERTa", "Roberta", byte_level_bpe, **ROBERTAS, config=POSITIONS_AFTER_PADDING, shares_rows=True),    # type: ignore[arg-type]
    Family("XLM-RoBERTa", "XLMRoberta", sentencepiece_unigram, **ROBERTAS, config=POSITIONS_AFTER_PADDING, shares_rows=True),    # type: ignore[arg-type]
    Family("CamemBERT", "Camembert", sentencepiece_unigram, **ROBERTAS, config=POSITIONS_AFTER_PADDING, shares_rows=True),    # type: ignore[arg-type]
    Family("DistilBERT", "DistilBert", wordpiece, config={"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}, shares_rows=True),
    Family("ELECTRA", "Electra", wordpiece, config={"embedding_size": 16}, shares_rows=True),
    Family("ALBERT", "Albert", sentencepiece_unigram, ("<pad>", "<unk>", "[CLS]", "[SEP]"), config={"embedding_size": 16}, shares_rows=True),
    Family("MPNet", "MPNet", wordpiece, ("<s>", "<pad>", "</s>", "[UNK]"), "{b} $A {e} {e} $B {e}", {"max_position_embeddings": MAX_TOKENS + 2}),
    Family("DeBERTa", "Deberta", byte_level_bpe, config={"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}),
    Family("DeBERTa-v2, v3", "DebertaV2", sentencepiece_unigram, ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), config={
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0,
    }),
    Family("ConvBERT", "ConvBert", wordpiece, config={"embedding_size": 16}),
    Family("ModernBERT", "ModernBert", byte_level_bpe, pair="{b} $A {e} $B {e}", config={"reference_compile": False}),
]
REFUSED = [
    Family("Nyströmformer", "Nystromformer", wordpiece, config={"num_landmarks": 8, "segment_means_seq_len": MAX_TOKENS}),
    Family("Funnel", "Funnel", wordpiece, config={"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1], "num_hidden_layers": None}),
    Family("XLNet", "XLNet", sentencepiece_unigram, config={"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "max_position_embeddings": None}),
]


def write_checkpoint(family: Family, folder: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """A classifier of that family with random weights, as its trainer would leave it."""
    folder.mkdir(parents=True)
    special = family.special
    ids = {name: family.order.index(token) for name, token in special.items()}
    tokenizer = family.tokenizer(family.order, special["unk"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="{b} $A {e}".format(**special), pair=family.pair.format(**special), special_tokens=[(special["b"], ids["b"]), (special["e"], ids["e"])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS, "pad_token": special["pad"]}))
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": MAX_TOKENS, "pad_token_id": ids["pad"], "bos_token_id": ids["b"], "eos_token_id": ids["e"], "cls_token_id": ids["b"],
        "sep_token_id": ids["e"],
    } | dict(family.config)
    torch.manual_seed(0)
    with plain_functions():
        config = getattr(transformers, f"{family.architecture}Config")(**{name: size for name, size in sizes.items() if size is not None})
        config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
        model = getattr(transformers, f"{family.architecture}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)    # far from equal probabilities, so that there is something to compare
    model.save_pretrained(folder)
    return folder, model.eval()


@torch.no_grad()
def expected(model: torch.nn.Module, folder: Path, text: Any) -> np.ndarray:
    """The probabilities that transformers computes of a text alone."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    both = (text["text"], text["text_pair"]) if isinstance(text, dict) else (text,)
    taken = tokenizer(*both, return_tensors="pt", truncation="longest_first", max_length=MAX_TOKENS, return_token_type_ids=True)
    if "token_type_ids" not in model.forward.__code__.co_varnames or getattr(model.config, "type_vocab_size", 2) < 2:
        taken.pop("token_type_ids")
    probabilities: np.ndarray = model(**taken).logits[0].softmax(-1).numpy()
    return probabilities


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
async def test_a_family_is_served_as_transformers_computes_it(family: Family, tmp_path: Path) -> None:
    folder, model = write_checkpoint(family, tmp_path / "checkpoint")
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.manifest.max_tokens == MAX_TOKENS
    texts = [*TEXTS, PAIR] if artifact.manifest.takes_pairs else TEXTS
    async with client_of(artifact) as (client, models):
        [loaded] = models.loaded.values()
        assert (loaded.classifier.packing is not None) == family.shares_rows
        # Each in three companies, some of which fill several rows.
        answers = (await classify(client, {"input": [*texts, *texts[::-1], *texts]})).json()["data"]
        companies = answers[: len(texts)], answers[len(texts) : 2 * len(texts)][::-1], answers[2 * len(texts) :]
        alone = [(await classify(client, {"input": text})).json()["data"][0] for text in texts]
    for text, by_itself, *in_company in zip(texts, alone, *companies, strict=True):
        wanted = expected(model, folder, text)
        assert by_itself["probs"] == pytest.approx(wanted, abs=2e-5)
        for one in in_company:
            assert one["probs"] == pytest.approx(by_itself["probs"], abs=1e-6 if artifact.manifest.padding_safe else 1e-5)
    assert [one["truncated"] for one in alone[:4]] == [False, False, False, True]


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_a_family_that_cannot_be_served_is_refused_and_leaves_nothing(family: Family, tmp_path: Path) -> None:
    folder, _ = write_checkpoint(family, tmp_path / "checkpoint")
    with pytest.raises((BadInput, Unavailable), match="cannot export this model"):
        export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_docs_table_has_these_rows() -> None:
    page = Path("docs/families.md").read_text()
    served = re.findall(r"^\| ([^|]+?) \| [^|]+ \| yes", page, re.M)
    refused = re.findall(r"^\| ([^|]+?) \| [^|]+ \| no", page, re.M)
    assert served == [family.name for family in FAMILIES]
    assert re.findall(r"^\| ([^|]+?) \| [^|]+ \| yes, in shared rows", page, re.M) == [family.name for family in FAMILIES if family.shares_rows]
    assert refused == [family.name for family in REFUSED]


# Checkpoints of older trainers, whose tokenizers are not in tokenizer.json


def assert_same_tokens(artifact: Path, own: Any) -> None:
    """The artifact's tokenizer reads texts as `own`, a slow one of transformers, does."""
    made = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    assert [list(made.encode(text).ids) for text in CORPUS[:40]] == [own(text)["input_ids"] for text in CORPUS[:40]]


def test_a_vocabulary_alone_becomes_the_tokenizer_that_transformers_makes_of_it(tmp_path: Path) -> None:
    family = FAMILIES[0]
    folder, _ = write_checkpoint(family, tmp_path / "checkpoint")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.__getitem__)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS, "tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    own = transformers.BertTokenizer(str(folder / "vocab.txt"))
    assert_same_tokens(tmp_path / "artifact", own)


def test_merges_alone_become_the_tokenizer_that_transformers_makes_of_them(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(FAMILIES[1], tmp_path / "checkpoint")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(merge)}\n" for merge in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS, "tokenizer_class": "RobertaTokenizer"}))
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    own = transformers.RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert_same_tokens(tmp_path / "artifact", own)


def test_a_sentencepiece_model_becomes_the_tokenizer_that_transformers_makes_of_it(tmp_path: Path) -> None:
    [albert] = [family for family in FAMILIES if family.name == "ALBERT"]
    folder, model = write_checkpoint(albert, tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "spiece"), vocab_size=model.config.vocab_size, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>", unk_piece="<unk>", bos_piece="[CLS]", eos_piece="[SEP]", user_defined_symbols=["[MASK]"],
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS, "tokenizer_class": "AlbertTokenizer"}))
    export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
    own = transformers.AlbertTokenizer(str(folder / "spiece.model"))
    assert_same_tokens(tmp_path / "artifact", own)


def test_a_checkpoint_without_any_tokenizer_says_what_to_save(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(FAMILIES[0], tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Unavailable, match=r"has no tokenizer\.json"):
        export(str(folder), tmp_path / "artifact", variants=["cpu-fp32"])
