"""
Writes tiny checkpoints of every family, with the quirks of real files, and the pipeline's answers.

    python tests/export/corpus.py FOLDER      write the checkpoints and the answers
    python tests/export/corpus.py             print the table of docs/families.md

It imports nothing from this repository, so that it runs under any transformers: each version writes
its own checkpoints and its own answers. Every row has FOLDER/<index>/checkpoint, and answers.json
next to it unless export refuses the row.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import pipeline

VERSIONS = ("4", "5")
"""Major versions of transformers: the one that export uses, and the newest."""
MAX_TOKENS = 48
SENTENCES = (
    "a charming and often affecting journey",
    "the plot is thin and the jokes are thinner",
    "would buy again",
    "no apparent joy",
    "It's not that the film is dull",
    "Ein Satz auf Deutsch, mit Umlauten: Übergröße, schön.",
    "¿Qué? – “quotes” 🙂",
    "The waiter brought the wrong dish twice, apologised once, and charged us for both.",
    "UPPER and lower, Café and cafe",
    "2 + 2 = 5 for sufficiently large values of 2",
    "この映画は素晴らしい",
    "这部电影很好看",
)
TEXTS: tuple[str | dict[str, str], ...] = (
    "a charming and often affecting journey",
    "Übergröße 🙂!",
    "x",
    "UPPER and Lower, Café",
    " a space first",
    "#hashtag of mine, #HASHTAG",
    "a [MASK] b <mask> c [SEP] d",
    "この映画は素晴らしい",
    "no apparent joy and then some more of it " * 12,
    "x <pad> [PAD] y",
    {"text": "is the film any good?", "text_pair": "it is, often"},
    {"text": "is it? " * 4, "text_pair": "no apparent joy and then some more of it " * 12},
)
Specials = Sequence[str]
"""Special tokens of a tokenizer, in the order of their ids: padding, unknown, begin, end, mask."""


def train_tokenizer(
    model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None
) -> Tokenizer:
    """Train a tokenizer on SENTENCES and return it."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def wordpiece(order: Specials, unknown: str, lowercase: bool = True) -> Tokenizer:
    """Return a WordPiece tokenizer, as BERT has."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=list(order), show_progress=False
    )
    return train_tokenizer(
        models.WordPiece(unk_token=unknown),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(lowercase=lowercase),
    )


def byte_level_bpe(order: Specials, unknown: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as RoBERTa has."""
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(order),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = train_tokenizer(
        models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_unigram(order: Specials, unknown: str) -> Tokenizer:
    """Return a unigram tokenizer, as SentencePiece trains it."""
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(order), unk_token=unknown, show_progress=False
    )
    spaces = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return train_tokenizer(models.Unigram(), trainer, pre_tokenizers.Metaspace(), spaces)


@dataclass(frozen=True)
class Family:
    """A family of models with its kind of tokenizer, small enough for a test."""

    name: str
    """Name in the table of docs/families.md."""
    architecture: str
    """Prefix of the class names in transformers."""
    tokenizer: Callable[[Specials, str], Tokenizer]
    """Function that trains the tokenizer, given the special tokens and the unknown token."""
    order: Specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    """Special tokens in the order of their ids."""
    pair: str = "{b} $A {e} $B:1 {e}:1"
    """Template of a pair of texts; {b} begins a text and {e} ends it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that differ from the default sizes; None removes one."""
    single: str = "{b} $A {e}"
    """Template of a single text."""

    @property
    def special(self) -> dict[str, str]:
        """Special tokens by their role: pad, unk, b (begin), e (end) and mask."""
        first, last = next(
            pair
            for pair in (("<cls>", "<sep>"), ("<s>", "</s>"), ("[CLS]", "[SEP]"))
            if pair[0] in self.order
        )
        return {
            "pad": next(token for token in self.order if token.lower() in ("[pad]", "<pad>")),
            "unk": next(token for token in self.order if token.lower() in ("[unk]", "<unk>")),
            "b": first,
            "e": last,
            "mask": next(token for token in self.order if "mask" in token.lower()),
        }


ROBERTAS: dict[str, Any] = {
    "order": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "pair": "{b} $A {e} {e} $B {e}",
}
# Packed rows may be longer than a text, so there are more positions than MAX_TOKENS.
POSITIONS_AFTER_PADDING = {"max_position_embeddings": 226, "type_vocab_size": 1}
SPM = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
FAMILIES = [
    Family("BERT", "Bert", wordpiece),
    Family("RoBERTa", "Roberta", byte_level_bpe, **ROBERTAS, config=POSITIONS_AFTER_PADDING),
    Family(
        "XLM-RoBERTa",
        "XLMRoberta",
        sentencepiece_unigram,
        **ROBERTAS,
        config=POSITIONS_AFTER_PADDING,
    ),
    Family(
        "CamemBERT",
        "Camembert",
        sentencepiece_unigram,
        (*ROBERTAS["order"], "<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"),
        ROBERTAS["pair"],
        POSITIONS_AFTER_PADDING,
    ),
    Family(
        "DistilBERT",
        "DistilBert",
        wordpiece,
        config={
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 64,
            "intermediate_size": None,
        },
    ),
    Family("ELECTRA", "Electra", wordpiece, config={"embedding_size": 16}),
    Family("ALBERT", "Albert", sentencepiece_unigram, SPM, config={"embedding_size": 16}),
    Family(
        "MPNet",
        "MPNet",
        wordpiece,
        ("<s>", "<pad>", "</s>", "[UNK]", "<mask>"),
        "{b} $A {e} {e} $B {e}",
        {"max_position_embeddings": MAX_TOKENS + 2},
    ),
    Family("DeBERTa", "Deberta", byte_level_bpe, config=DEBERTA),
    Family(
        "DeBERTa-v2, v3",
        "DebertaV2",
        sentencepiece_unigram,
        ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"),
        config=DEBERTA,
    ),
    Family("ConvBERT", "ConvBert", wordpiece, config={"embedding_size": 16}),
    Family("ModernBERT", "ModernBert", byte_level_bpe, pair="{b} $A {e} $B {e}"),
    Family("Data2Vec", "Data2VecText", byte_level_bpe, **ROBERTAS, config=POSITIONS_AFTER_PADDING),
    Family(
        "MobileBERT",
        "MobileBert",
        wordpiece,
        config={"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    Family("SqueezeBERT", "SqueezeBert", wordpiece, config={"embedding_size": 32}),
    Family("Megatron-BERT", "MegatronBert", wordpiece),
    Family(
        "RemBERT",
        "RemBert",
        sentencepiece_unigram,
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        config={"input_embedding_size": 16, "output_embedding_size": 16},
    ),
    Family("ERNIE", "Ernie", wordpiece),
    Family("I-BERT", "IBert", byte_level_bpe, **ROBERTAS, config=POSITIONS_AFTER_PADDING),
    Family("LayoutLM", "LayoutLM", wordpiece),
    Family(
        "XLM-RoBERTa-XL",
        "XLMRobertaXL",
        sentencepiece_unigram,
        **ROBERTAS,
        config=POSITIONS_AFTER_PADDING,
    ),
    Family(
        "RoBERTa-PreLayerNorm",
        "RobertaPreLayerNorm",
        byte_level_bpe,
        **ROBERTAS,
        config=POSITIONS_AFTER_PADDING,
    ),
    Family(
        "BigBird",
        "BigBird",
        sentencepiece_unigram,
        ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"),
        config={"attention_type": "original_full"},
    ),
    Family(
        "XLNet",
        "XLNet",
        sentencepiece_unigram,
        ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"),
        "$A {e} $B:1 {e}:1 {b}:2",
        {
            "d_model": 32,
            "n_layer": 2,
            "n_head": 2,
            "d_inner": 64,
            "max_position_embeddings": None,
            "intermediate_size": None,
        },
        "$A {e} {b}:2",
    ),
]
ONLY_IN_4 = [Family("YOSO", "Yoso", wordpiece), Family("Nezha", "Nezha", wordpiece)]
"""Families that transformers 5 has removed, or cannot save."""
# The code of these families depends on a text's length, which a graph does not allow.
UNTRACEABLE = {
    "torch cannot export this model": Family(
        "Nyströmformer",
        "Nystromformer",
        wordpiece,
        config={"num_landmarks": 8, "segment_means_seq_len": MAX_TOKENS},
    ),
    "depends on a text's length": Family(
        "Longformer",
        "Longformer",
        byte_level_bpe,
        **ROBERTAS,
        config=POSITIONS_AFTER_PADDING | {"attention_window": [8, 8]},
    ),
    "its family funnel depends on a text's length": Family(
        "Funnel",
        "Funnel",
        wordpiece,
        config={
            "d_model": 32,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 64,
            "block_sizes": [1, 1],
            "num_hidden_layers": None,
            "intermediate_size": None,
        },
    ),
    "its family xmod depends on a text's length": Family(
        "X-MOD",
        "Xmod",
        sentencepiece_unigram,
        **ROBERTAS,
        config=POSITIONS_AFTER_PADDING | {"languages": ["en_XX"], "default_language": "en_XX"},
    ),
}
XLMS: dict[str, Any] = {
    "config": (
        {"emb_dim": 32, "n_layers": 2, "n_heads": 2}
        | dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        )
    ),
}
WITHOUT_A_FAST_TOKENIZER = [
    Family("XLM", "XLM", wordpiece, **XLMS),
    Family("FlauBERT", "Flaubert", wordpiece, **XLMS),
]
ONLY_IN_5 = Family("EuroBERT", "EuroBert", byte_level_bpe)
BY_NAME = {
    family.name: family
    for family in (
        *FAMILIES,
        *ONLY_IN_4,
        *UNTRACEABLE.values(),
        *WITHOUT_A_FAST_TOKENIZER,
        ONLY_IN_5,
    )
}


def write_family(
    folder: Path,
    family: Family,
    labels: int = 2,
    lowercase: bool | None = None,
    resave: bool = True,
    **fields: Any,
) -> None:
    """Write a classifier of a family with random weights, as its trainer would.

    It has `labels` labels, and a tokenizer that is cased or not. With `resave` this version of
    transformers writes the files of the tokenizer. `fields` are fields of the config.
    """
    folder.mkdir(parents=True)
    special = family.special
    ids = {name: family.order.index(token) for name, token in special.items()}
    tokenizer = (
        family.tokenizer(family.order, special["unk"])
        if lowercase is None
        else wordpiece(family.order, special["unk"], lowercase)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=family.single.format(**special),
        pair=family.pair.format(**special),
        special_tokens=[(special["b"], ids["b"]), (special["e"], ids["e"])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_fields = {
        "model_max_length": MAX_TOKENS,
        "pad_token": special["pad"],
        "unk_token": special["unk"],
        "cls_token": special["b"],
        "sep_token": special["e"],
        "mask_token": special["mask"],
    } | ({} if lowercase is None else {"do_lower_case": lowercase})
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_fields))
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": ids["pad"],
        "bos_token_id": ids["b"],
        "eos_token_id": ids["e"],
        "cls_token_id": ids["b"],
        "sep_token_id": ids["e"],
        **family.config,
        **fields,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.architecture}Config")(
        **{name: size for name, size in sizes.items() if size is not None}
    )
    config.id2label = {number: f"LABEL {number}" for number in range(labels)}
    config.label2id = {label: number for number, label in config.id2label.items()}
    model = getattr(transformers, f"{family.architecture}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # Scaled up, because near-equal probabilities compare nothing.
    model.save_pretrained(folder)
    if resave:
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


# Changes to the files of a checkpoint

Change = Callable[[Path], object]


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    """Change fields of a JSON file; None removes a field."""
    path = folder / name
    fields = json.loads(path.read_text()) if path.exists() else {}
    fields |= changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def config(**changes: Any) -> Change:
    """Change fields of config.json."""
    return lambda folder: edit_json(folder, "config.json", **changes)


def cross_encoder(**changes: Any) -> Change:
    """Write what sentence-transformers 6 stores of a CrossEncoder, with changes."""
    fields = {"model_type": "CrossEncoder", "prompts": {}, **changes}
    return lambda folder: edit_json(folder, "config_sentence_transformers.json", **fields)


def tokenizer_config(**changes: Any) -> Change:
    """Change fields of tokenizer_config.json."""
    return lambda folder: edit_json(folder, "tokenizer_config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Replace the tensors of model.safetensors by what `change` returns for them."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def extra_tensors(**sizes: int) -> Change:
    """Add tensors of ones; `__` in a name stands for a dot."""
    added = {name.replace("__", "."): torch.ones(size) for name, size in sizes.items()}
    return tensors(lambda stored: stored | added)


def prefix_names(prefix: str) -> Change:
    """Put a prefix before the name of every tensor."""
    return tensors(lambda stored: {f"{prefix}{name}": tensor for name, tensor in stored.items()})


def cast(dtype: torch.dtype) -> Change:
    """Store floating-point tensors in another precision."""
    return tensors(
        lambda stored: {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in stored.items()
        }
    )


def without_tensors(part: str) -> Change:
    """Remove the tensors whose name contains `part`."""
    return tensors(
        lambda stored: {name: tensor for name, tensor in stored.items() if part not in name}
    )


def rename_weights(name: str) -> Change:
    """Rename model.safetensors."""
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def grow_embeddings(folder: Path, by: int) -> None:
    """Add embeddings for `by` more tokens."""
    names = [
        name
        for name in load_file(folder / "model.safetensors")
        if name.endswith("word_embeddings.weight")
    ]

    def grow(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        return stored | {
            name: torch.cat([stored[name], torch.randn(by, stored[name].shape[1])])
            for name in names
        }

    tensors(grow)(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit_json(folder, "config.json", vocab_size=vocabulary + by)


def add_token(location: str, grow: bool = True) -> Change:
    """Add the token `#hashtag` in one file only."""

    def apply(folder: Path) -> None:
        token_id = json.loads((folder / "config.json").read_text())["vocab_size"]
        if location == "added_tokens.json":
            (folder / location).write_text(json.dumps({"#hashtag": token_id}))
        elif location == "added_tokens_decoder":
            decoder = json.loads((folder / "tokenizer_config.json").read_text()).get(
                "added_tokens_decoder", {}
            )
            token = {
                "content": "#hashtag",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": False,
            }
            edit_json(
                folder,
                "tokenizer_config.json",
                added_tokens_decoder=decoder | {str(token_id): token},
            )
        else:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.add_tokens(["#hashtag"])
            tokenizer.save(str(folder / "tokenizer.json"))
        if grow:
            grow_embeddings(folder, 1)

    return apply


def shard(folder: Path) -> None:
    """Split model.safetensors into two files and an index."""
    stored = list(load_file(folder / "model.safetensors").items())
    weight_map: dict[str, str] = {}
    for number, half in ((1, stored[::2]), (2, stored[1::2])):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(half), folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(dict(half), name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


def without(*names: str) -> Change:
    """Remove files."""

    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def write_files(**files: str) -> Change:
    """Write files; the last `_` of a name stands for a dot."""

    def apply(folder: Path) -> None:
        for name, text in files.items():
            (folder / ".".join(name.rsplit("_", 1))).write_text(text)

    return apply


def tokenizer_json(**changes: Any) -> Change:
    """Change fields of tokenizer.json, which may be null."""

    def apply(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def null(field: str) -> Change:
    """Set a field of config.json to null."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))

    return apply


def prune(folder: Path) -> None:
    """Prune a head of the first layer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.prune_heads({0: [1]})
    model.save_pretrained(folder)


def rotary(full: float, sliding: float) -> Change:
    """Set the bases of ModernBERT's rotary positions, as this transformers names them."""

    def apply(folder: Path) -> None:
        if "rope_parameters" in json.loads((folder / "config.json").read_text()):
            ropes = {
                name: {"rope_theta": theta, "rope_type": "default"}
                for name, theta in (("full_attention", full), ("sliding_attention", sliding))
            }
            edit_json(folder, "config.json", rope_parameters=ropes)
        else:
            edit_json(folder, "config.json", global_rope_theta=full, local_rope_theta=sliding)

    return apply


@dataclass(frozen=True)
class Row:
    """A checkpoint of the corpus, and what export does with it."""

    name: str
    """Description in the table of docs/families.md."""
    family: str = "BERT"
    """Name of the family in BY_NAME."""
    changes: tuple[Change, ...] = ()
    """Changes to the files before the pipeline answers."""
    refused: str | None = None
    """Part of the message with which export refuses the checkpoint; None if it is exported."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of write_family."""
    raw: bool = False
    """Whether the pipeline answers with logits, as a CrossEncoder without activation does."""
    versions: tuple[str, ...] = VERSIONS
    """Versions of transformers that can write the checkpoint."""
    answered: int = 9
    """Number of TEXTS that the pipeline answers at least; it fails on some."""
    later: tuple[Change, ...] = ()
    """Changes after the pipeline has answered, which would make the files unreadable for it."""


def quirk(
    name: str,
    *changes: Change,
    family: str = "BERT",
    refused: str | None = None,
    raw: bool = False,
    versions: tuple[str, ...] = VERSIONS,
    answered: int = 9,
    later: Change | None = None,
    **options: Any,
) -> Row:
    """Return a row of a family with changed files; `options` are those of write_family."""
    return Row(
        name,
        family,
        changes,
        refused,
        options,
        raw,
        versions,
        answered,
        () if later is None else (later,),
    )


ROWS = [
    *(Row(family.name, family.name) for family in FAMILIES),
    *(Row(family.name, family.name, versions=("4",)) for family in ONLY_IN_4),
    *(
        Row(
            family.name,
            family.name,
            refused=reason,
            options={"resave": False},
            versions=("4",) if family.name == "Funnel" else VERSIONS,
        )
        for reason, family in UNTRACEABLE.items()
    ),
    *(
        Row(family.name, family.name, refused="needs another package", options={"resave": False})
        for family in WITHOUT_A_FAST_TOKENIZER
    ),
    *(
        quirk(
            f"{family.name} with a fast tokenizer",
            tokenizer_config(tokenizer_class="PreTrainedTokenizerFast"),
            family=family.name,
            resave=False,
        )
        for family in WITHOUT_A_FAST_TOKENIZER
    ),
    Row(ONLY_IN_5.name, ONLY_IN_5.name, refused="knows no family 'eurobert'", versions=("5",)),
    # Tokenizers
    quirk(
        "do_lower_case false over a lower-casing tokenizer.json",
        tokenizer_config(do_lower_case=False),
    ),
    quirk(
        "do_lower_case true over a cased tokenizer.json",
        tokenizer_config(do_lower_case=True),
        lowercase=False,
        resave=False,
    ),
    quirk("cased", lowercase=False),
    quirk("strip_accents false", tokenizer_config(strip_accents=False)),
    quirk("tokenize_chinese_chars false", tokenizer_config(tokenize_chinese_chars=False)),
    quirk("add_prefix_space", tokenizer_config(add_prefix_space=True), family="RoBERTa"),
    quirk("a token in added_tokens_decoder only", add_token("added_tokens_decoder")),
    quirk("a token in added_tokens.json only", add_token("added_tokens.json")),
    quirk("a token added to tokenizer.json", add_token("tokenizer.json")),
    quirk(
        "a token without an embedding",
        add_token("tokenizer.json", grow=False),
        refused="its tokenizer has the token '#hashtag' with id",
    ),
    quirk("truncation_side left", tokenizer_config(truncation_side="left")),
    quirk("padding_side left", tokenizer_config(padding_side="left")),
    quirk(
        "truncation and padding stored in tokenizer.json",
        tokenizer_json(
            truncation={
                "direction": "Right",
                "max_length": 8,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            padding={
                "strategy": {"Fixed": 16},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            },
        ),
    ),
    quirk(
        "a tokenizer that gives no token types",
        tokenizer_config(model_input_names=["input_ids", "attention_mask"]),
    ),
    quirk("no tokenizer_config.json", without("tokenizer_config.json"), resave=False),
    quirk(
        "model_max_length is a string",
        tokenizer_config(model_max_length="48"),
        refused="model_max_length is '48'",
    ),
    quirk(
        "model_max_length -1",
        tokenizer_config(model_max_length=-1),
        refused="model_max_length is -1",
    ),
    quirk(
        "a tokenizer with code of its own",
        tokenizer_config(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
        refused="code of the checkpoint's own",
    ),
    quirk(
        "a tokenizer written in Python",
        tokenizer_config(
            tokenizer_class="BertJapaneseTokenizer",
            word_tokenizer_type="basic",
            subword_tokenizer_type="character",
        ),
        lambda folder: (folder / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"])
        ),
        refused="has no fast form",
    ),
    # Labels and scores
    quirk("one label", labels=1),
    quirk(
        "one label, single_label_classification",
        config(problem_type="single_label_classification"),
        labels=1,
        versions=("4",),
    ),
    quirk("one label, regression", config(problem_type="regression"), labels=1),
    quirk(
        "one label, a CrossEncoder's sigmoid",
        config(
            sentence_transformers={
                "activation_fn": "torch.nn.modules.activation.Sigmoid",
                "version": "5.0.0",
            }
        ),
        labels=1,
    ),
    quirk(
        "one label, a CrossEncoder's identity",
        config(sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}),
        labels=1,
        raw=True,
    ),
    quirk(
        "one label, a CrossEncoder's identity under its older name",
        config(sbert_ce_default_activation_function="torch.nn.modules.linear.Identity"),
        labels=1,
        raw=True,
    ),
    quirk(
        "one label, a CrossEncoder of release 6 with the identity",
        cross_encoder(activation_fn="torch.nn.modules.linear.Identity"),
        labels=1,
        raw=True,
    ),
    quirk(
        "one label, a CrossEncoder of release 6 whose sigmoid overrides config.json",
        config(sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}),
        cross_encoder(activation_fn="torch.nn.modules.activation.Sigmoid"),
        labels=1,
    ),
    quirk(
        "one label, a CrossEncoder of release 6 with prompts and no default",
        cross_encoder(prompts={"query": "query: "}, default_prompt_name="none"),
        labels=1,
    ),
    quirk(
        "one label, a CrossEncoder's default prompt",
        cross_encoder(prompts={"query": "query: "}, default_prompt_name="query"),
        labels=1,
        refused="puts 'query: ' before every text",
    ),
    quirk(
        "one label, a CrossEncoder with a module behind the model",
        cross_encoder(),
        write_files(
            modules_json=json.dumps(
                [{"type": "a.modules.Transformer"}, {"type": "a.modules.Dense"}]
            )
        ),
        labels=1,
        refused="lists 2 modules (Transformer, Dense)",
    ),
    quirk(
        "one label, a CrossEncoder that lower-cases outside of its tokenizer",
        cross_encoder(),
        write_files(sentence_bert_config_json='{"do_lower_case": true}'),
        labels=1,
        refused="do_lower_case is True",
    ),
    quirk(
        "one label, another activation",
        config(sentence_transformers={"activation_fn": "torch.nn.modules.activation.Tanh"}),
        labels=1,
        refused="activation of its CrossEncoder is 'torch.nn.modules.activation.Tanh'",
    ),
    quirk("three labels", labels=3),
    quirk(
        "three labels, a CrossEncoder's identity",
        config(sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}),
        labels=3,
    ),
    quirk("several labels", config(problem_type="multi_label_classification"), labels=3),
    quirk("regression of two", config(problem_type="regression")),
    quirk(
        "labels that are numbered from 1",
        config(id2label={"1": "A", "2": "B"}, label2id={"A": 1, "B": 2}),
        refused="id2label numbers its 2 classes 1, 2",
    ),
    quirk(
        "two labels with the same name",
        config(id2label={"0": "A", "1": "A"}),
        refused="both called 'A'",
    ),
    quirk("an unknown problem_type", config(problem_type="ranking"), refused="problem_type"),
    # Weights
    quirk(
        "RoBERTa's pooler, which its classifier does not have",
        extra_tensors(roberta__pooler__dense__weight=4, roberta__pooler__dense__bias=4),
        family="RoBERTa",
    ),
    quirk(
        "DistilBERT's vocabulary head",
        extra_tensors(vocab_transform__weight=4, vocab_layer_norm__bias=4, vocab_projector__bias=4),
        family="DistilBERT",
    ),
    quirk(
        "DeBERTa's language model head",
        extra_tensors(lm_predictions__lm_head__dense__weight=4, mask_predictions__dense__bias=4),
        family="DeBERTa-v2, v3",
    ),
    quirk("a masked language model's head", extra_tensors(cls__predictions__bias=4)),
    quirk("a loss's weights", extra_tensors(loss_fct__weight=2)),
    quirk("shards", shard),
    quirk("names of a compiled module", later=prefix_names("_orig_mod.")),
    quirk("names of a parallel module", later=prefix_names("module.")),
    quirk("fp16", cast(torch.float16)),
    quirk("bf16", cast(torch.bfloat16)),
    quirk("fp64", cast(torch.float64)),
    quirk(
        "a body without a head",
        without_tensors("classifier"),
        refused="no classification head",
    ),
    quirk(
        "a missing layer",
        without_tensors("layer.1.output.dense.bias"),
        refused="lacks the tensor",
    ),
    quirk(
        "a git-lfs pointer",
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        refused="git-lfs pointer",
    ),
    quirk(
        "pickles only",
        rename_weights("pytorch_model.bin"),
        refused="is a pickle and is never read",
    ),
    quirk(
        "TensorFlow's weights only",
        rename_weights("tf_model.h5"),
        refused="holds TensorFlow weights",
    ),
    quirk(
        "Flax's weights only",
        rename_weights("flax_model.msgpack"),
        refused="holds Flax weights",
    ),
    quirk(
        "another variant of the weights only",
        rename_weights("model.fp16.safetensors"),
        refused="another variant",
    ),
    quirk(
        "a PEFT adapter",
        write_files(adapter_config_json="{}"),
        without("config.json"),
        refused="PEFT adapter",
    ),
    quirk("SetFit", write_files(config_setfit_json="{}", model_head_pkl="x"), refused="SetFit"),
    # Configs
    quirk("torchscript in config.json", later=config(torchscript=True)),
    quirk(
        "return_dict false in config.json",
        later=config(return_dict=False, output_hidden_states=True),
    ),
    quirk("chunk_size_feed_forward", config(chunk_size_feed_forward=1)),
    quirk("an unknown field", config(my_own_note="of last spring"), versions=("4",)),
    quirk(
        "an unknown field, saved by a newer transformers",
        config(my_own_note="of last spring"),
        versions=("5",),
        refused="has the field my_own_note",
    ),
    quirk("names of a module inside a trainer's module", later=prefix_names("model.")),
    quirk(
        "a field of a newer transformers",
        config(swirl_attention=True, transformers_version="99.0.0"),
        refused="has the field swirl_attention",
    ),
    quirk("BERT with one token type", type_vocab_size=1),
    quirk("RoBERTa with padding id 0", family="RoBERTa", pad_token_id=0),
    quirk("ModernBERT with other rotary bases", rotary(80_000.0, 20_000.0), family="ModernBERT"),
    quirk("mmBERT's rotary bases", rotary(160_000.0, 160_000.0), family="ModernBERT"),
    quirk("ModernBERT that averages its tokens", family="ModernBERT", classifier_pooling="mean"),
    quirk("BERT with relative positions", position_embedding_type="relative_key", versions=("4",)),
    quirk(
        "BERT with relative positions in config.json only",
        config(position_embedding_type="relative_key"),
        versions=("5",),
    ),
    quirk(
        "BigBird with sparse attention, for short texts",
        family="BigBird",
        attention_type="block_sparse",
    ),
    quirk(
        "BigBird with sparse attention",
        tokenizer_config(model_max_length=1024),
        family="BigBird",
        attention_type="block_sparse",
        max_position_embeddings=1024,
        refused="attention_type is block_sparse",
    ),
    quirk(
        "no length limit anywhere",
        tokenizer_config(model_max_length=10**30),
        family="XLNet",
        resave=False,
        refused="3 to 32,768 can be served",
    ),
    quirk("BERT with pruned heads", prune, versions=("4",)),
    quirk(
        "RoBERTa without a padding id",
        family="RoBERTa",
        later=null("pad_token_id"),
        refused="pad_token_id is null",
    ),
    quirk(
        "an unknown hidden_act",
        config(hidden_act="foo"),
        refused="describes no classifier",
    ),
    # Other tasks, other kinds of model
    quirk(
        "question answering",
        config(architectures=["BertForQuestionAnswering"]),
        refused="is a BertForQuestionAnswering",
    ),
    quirk(
        "multiple choice",
        config(architectures=["BertForMultipleChoice"]),
        refused="is a BertForMultipleChoice",
    ),
    quirk(
        "a model with code of its own",
        config(
            architectures=["MyBertForSequenceClassification"],
            auto_map={"AutoModelForSequenceClassification": "my.MyBert"},
        ),
        refused="code of the checkpoint's own",
    ),
    quirk(
        "a decoder",
        config(model_type="gpt2", architectures=["GPT2ForSequenceClassification"]),
        refused="family gpt2, a decoder",
    ),
    quirk(
        "another decoder",
        config(model_type="llama", architectures=["LlamaForSequenceClassification"]),
        refused="family llama, a decoder",
    ),
    quirk(
        "an encoder with a decoder",
        config(model_type="bart", architectures=["BartForSequenceClassification"]),
        refused="family bart, an encoder with a decoder",
    ),
    quirk(
        "an unknown family",
        config(model_type="no-such-model"),
        refused="describes no classifier",
    ),
]


def answers(folder: Path, row: Row) -> dict[str, Any]:
    """Return the pipeline's scores of each text, by label; None for a text that it fails on."""
    pipe = pipeline(
        "text-classification",
        model=str(folder),
        top_k=None,
        truncation=True,
        **({"function_to_apply": "none"} if row.raw else {}),
    )
    scores: list[dict[str, float] | None] = []
    for text in TEXTS:
        try:
            answer = pipe(text)
        except Exception as error:
            print(
                f"{row.name}: {text!r}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr
            )
            scores.append(None)
            continue
        labels = answer[0] if isinstance(answer[0], list) else answer
        scores.append({label["label"]: label["score"] for label in labels})
    return {"texts": TEXTS, "answers": scores, "transformers": transformers.__version__}


def table() -> str:
    """Return the table of docs/families.md: what export does with each row.

    tests/export/test_corpus.py checks both the outcomes and the table.
    """
    lines = ["| checkpoint | family | saved by transformers | outcome |", "|---|---|---|---|"]
    for row in ROWS:
        saved = " and ".join({"4": "4.57", "5": "5.24"}[version] for version in row.versions)
        name = "plain" if row.name == row.family else row.name
        if row.refused is not None:
            outcome = f"refused: {row.refused}"
        else:
            outcome = "as a CrossEncoder" if row.raw else "as the pipeline"
        lines.append(f"| {name} | {row.family} | {saved} | {outcome} |")
    return "\n".join(lines)


def write_all(out: Path, rows: Sequence[Row] = ROWS) -> Iterator[Path]:
    """Write every row that this transformers can write, and yield their folders."""
    for index, row in enumerate(rows):
        folder = out / f"{index:02}" / "checkpoint"
        try:
            write_family(folder, BY_NAME[row.family], **row.options)
            for change in row.changes:
                change(folder)
            expected = None if row.refused else answers(folder, row)
            for change in row.later:
                change(folder)
        except Exception as error:  # This transformers cannot write the row, so it is left out.
            print(f"{row.name}: {type(error).__name__}: {error}", file=sys.stderr)
            shutil.rmtree(folder.parent)
            continue
        if expected is not None:
            (folder.parent / "answers.json").write_text(json.dumps(expected))
        yield folder


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print(table())
        sys.exit()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(
        f"{len(list(write_all(Path(sys.argv[1]))))} checkpoints by transformers"
        f" {transformers.__version__}"
    )
