"""
Tiny checkpoints as people have them, and what `transformers.pipeline` answers of each: families,
and the quirks of their files.

    python tests/export/corpus.py FOLDER      write the checkpoints and the answers
    python tests/export/corpus.py             print the table of docs/families.md

It imports nothing of this repository, so that it runs under any transformers: each version writes
its own checkpoints and its own answers. For every row there is FOLDER/<place>/checkpoint, and
answers.json beside it where there is an answer to compare with.
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
"""Of transformers: the one that export uses, and the newest."""
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
"""What stands for padding, an unknown word, the beginning, the end and a mask; their ids are their
places in `order`.
"""


def trained(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def wordpiece(order: Specials, unknown: str, lowercase: bool = True) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=list(order), show_progress=False
    )
    return trained(
        models.WordPiece(unk_token=unknown),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(lowercase=lowercase),
    )


def byte_level_bpe(order: Specials, unknown: str) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(order),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made = trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece_unigram(order: Specials, unknown: str) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(order), unk_token=unknown, show_progress=False
    )
    spaces = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), spaces)


@dataclass(frozen=True)
class Family:
    name: str
    architecture: str
    tokenizer: Callable[[Specials, str], Tokenizer]
    order: Specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pair: str = "{b} $A {e} $B:1 {e}:1"
    config: Mapping[str, Any] = field(default_factory=dict)
    single: str = "{b} $A {e}"

    @property
    def special(self) -> dict[str, str]:
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
POSITIONS_AFTER_PADDING = {
    "max_position_embeddings": 226,
    "type_vocab_size": 1,
}  # rows may be longer than texts
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
OF_ONE_VERSION = [Family("YOSO", "Yoso", wordpiece), Family("Nezha", "Nezha", wordpiece)]
"""Those that transformers 5 has no longer, or cannot save."""
# Their code looks at a text's length where a graph cannot.
UNTRACEABLE = {
    "torch cannot export this model": Family(
        "Nyströmformer",
        "Nystromformer",
        wordpiece,
        config={"num_landmarks": 8, "segment_means_seq_len": MAX_TOKENS},
    ),
    "looks at a text's length": Family(
        "Longformer",
        "Longformer",
        byte_level_bpe,
        **ROBERTAS,
        config=POSITIONS_AFTER_PADDING | {"attention_window": [8, 8]},
    ),
    "its family funnel looks at a text's length": Family(
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
    "its family xmod looks at a text's length": Family(
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
        *OF_ONE_VERSION,
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
    **more: Any,
) -> None:
    """A classifier of that family with random weights, as its trainer would leave it: `labels` of
    them, a tokenizer that is cased or not.

    `resave`: its tokenizer's files are those that this transformers writes. `more` are fields of
    its config.
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
    described = {
        "model_max_length": MAX_TOKENS,
        "pad_token": special["pad"],
        "unk_token": special["unk"],
        "cls_token": special["b"],
        "sep_token": special["e"],
        "mask_token": special["mask"],
    } | ({} if lowercase is None else {"do_lower_case": lowercase})
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
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
        **more,
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
            parameter.mul_(3)  # far from equal probabilities, so that there is something to compare
    model.save_pretrained(folder)
    if resave:
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


# What is done to a checkpoint's files

Change = Callable[[Path], object]


def edited(folder: Path, name: str, **changes: Any) -> None:
    """Changes fields of a JSON file; None takes one out."""
    path = folder / name
    described = json.loads(path.read_text()) if path.exists() else {}
    described |= changes
    path.write_text(
        json.dumps({key: value for key, value in described.items() if value is not None})
    )


def config(**changes: Any) -> Change:
    return lambda folder: edited(folder, "config.json", **changes)


def tokenizer_config(**changes: Any) -> Change:
    return lambda folder: edited(folder, "tokenizer_config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def extra(**shapes: int) -> Change:
    return tensors(
        lambda own: (
            own | {name.replace("__", "."): torch.ones(size) for name, size in shapes.items()}
        )
    )


def prefixed(prefix: str) -> Change:
    return tensors(lambda own: {f"{prefix}{name}": tensor for name, tensor in own.items()})


def cast(dtype: torch.dtype) -> Change:
    return tensors(
        lambda own: {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in own.items()
        }
    )


def grown(folder: Path, by: int) -> None:
    """Embeddings of `by` more tokens."""
    names = [
        name
        for name in load_file(folder / "model.safetensors")
        if name.endswith("word_embeddings.weight")
    ]

    def grow(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        return own | {
            name: torch.cat([own[name], torch.randn(by, own[name].shape[1])]) for name in names
        }

    tensors(grow)(folder)
    edited(
        folder,
        "config.json",
        vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"] + by,
    )


def with_a_token(where: str, grow: bool = True) -> Change:
    """`#hashtag` as a token of its own, which only one file says."""

    def apply(folder: Path) -> None:
        number = json.loads((folder / "config.json").read_text())["vocab_size"]
        if where == "added_tokens.json":
            (folder / where).write_text(json.dumps({"#hashtag": number}))
        elif where == "added_tokens_decoder":
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
            edited(
                folder, "tokenizer_config.json", added_tokens_decoder=decoder | {str(number): token}
            )
        else:
            made = Tokenizer.from_file(str(folder / "tokenizer.json"))
            made.add_tokens(["#hashtag"])
            made.save(str(folder / "tokenizer.json"))
        if grow:
            grown(folder, 1)

    return apply


def sharded(folder: Path) -> None:
    own = load_file(folder / "model.safetensors")
    halves = [dict(list(own.items())[::2]), dict(list(own.items())[1::2])]
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, metadata={"format": "pt"})
    places = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    (folder / "model.safetensors").unlink()


def only(*names: str) -> Change:
    """Without these files."""

    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def written(**files: str) -> Change:
    """With these files, `_` for a dot in the last place of their names."""

    def apply(folder: Path) -> None:
        for name, text in files.items():
            (folder / ".".join(name.rsplit("_", 1))).write_text(text)

    return apply


def tokenizer_json(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        described = json.loads((folder / "tokenizer.json").read_text())
        change(described)
        (folder / "tokenizer.json").write_text(json.dumps(described))

    return apply


def null(field: str) -> Change:
    """With a field of config.json that is null."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))

    return apply


def pruned(folder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.prune_heads({0: [1]})
    model.save_pretrained(folder)


def rotary(full: float, sliding: float) -> Change:
    """Bases of ModernBERT's rotary positions, as this transformers says them."""

    def apply(folder: Path) -> None:
        if "rope_parameters" in json.loads((folder / "config.json").read_text()):
            ropes = {
                name: {"rope_theta": theta, "rope_type": "default"}
                for name, theta in (("full_attention", full), ("sliding_attention", sliding))
            }
            edited(folder, "config.json", rope_parameters=ropes)
        else:
            edited(folder, "config.json", global_rope_theta=full, local_rope_theta=sliding)

    return apply


@dataclass(frozen=True)
class Row:
    name: str
    family: str = "BERT"
    changes: tuple[Change, ...] = ()
    refused: str | None = None
    """What export says, where it refuses."""
    make: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    """Whether the answer to compare with is the pipeline's logit, which a CrossEncoder gives."""
    versions: tuple[str, ...] = VERSIONS
    """Which versions of transformers can make it."""
    answered: int = 9
    """How many of TEXTS the pipeline answers at least: it fails on some."""
    later: tuple[Change, ...] = ()
    """What is done once the pipeline has answered, because it cannot read the files then."""


def quirk(
    name: str,
    *changes: Change,
    family: str = "BERT",
    refused: str | None = None,
    raw: bool = False,
    versions: tuple[str, ...] = VERSIONS,
    answered: int = 9,
    later: Change | None = None,
    **make: Any,
) -> Row:
    return Row(
        name,
        family,
        changes,
        refused,
        make,
        raw,
        versions,
        answered,
        () if later is None else (later,),
    )


ROWS = [
    *(Row(family.name, family.name) for family in FAMILIES),
    *(Row(family.name, family.name, versions=("4",)) for family in OF_ONE_VERSION),
    *(
        Row(
            family.name,
            family.name,
            refused=why,
            make={"resave": False},
            versions=("4",) if family.name == "Funnel" else VERSIONS,
        )
        for why, family in UNTRACEABLE.items()
    ),
    *(
        Row(family.name, family.name, refused="takes another package", make={"resave": False})
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
    quirk("a token that only added_tokens_decoder names", with_a_token("added_tokens_decoder")),
    quirk("a token that only added_tokens.json names", with_a_token("added_tokens.json")),
    quirk("a token added to tokenizer.json", with_a_token("tokenizer.json")),
    quirk(
        "a token without an embedding",
        with_a_token("tokenizer.json", grow=False),
        refused="its tokenizer knows '#hashtag' as number",
    ),
    quirk("truncation_side left", tokenizer_config(truncation_side="left")),
    quirk("padding_side left", tokenizer_config(padding_side="left")),
    quirk(
        "truncation and padding stored in tokenizer.json",
        tokenizer_json(
            lambda own: own.update(
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
            )
        ),
    ),
    quirk(
        "a tokenizer that gives no token types",
        tokenizer_config(model_input_names=["input_ids", "attention_mask"]),
    ),
    quirk("no tokenizer_config.json", only("tokenizer_config.json"), resave=False),
    quirk(
        "model_max_length is a word",
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
        "one label, a CrossEncoder's identity by its older name",
        config(sbert_ce_default_activation_function="torch.nn.modules.linear.Identity"),
        labels=1,
        raw=True,
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
        "labels that begin with 1",
        config(id2label={"1": "A", "2": "B"}, label2id={"A": 1, "B": 2}),
        refused="id2label numbers its 2 classes 1, 2",
    ),
    quirk(
        "two labels of one name", config(id2label={"0": "A", "1": "A"}), refused="both called 'A'"
    ),
    quirk("an unknown problem_type", config(problem_type="ranking"), refused="problem_type"),
    # Weights
    quirk(
        "RoBERTa's pooler, which its classifier has no place for",
        extra(roberta__pooler__dense__weight=4, roberta__pooler__dense__bias=4),
        family="RoBERTa",
    ),
    quirk(
        "DistilBERT's vocabulary head",
        extra(vocab_transform__weight=4, vocab_layer_norm__bias=4, vocab_projector__bias=4),
        family="DistilBERT",
    ),
    quirk(
        "DeBERTa's language model head",
        extra(lm_predictions__lm_head__dense__weight=4, mask_predictions__dense__bias=4),
        family="DeBERTa-v2, v3",
    ),
    quirk("a masked language model's head", extra(cls__predictions__bias=4)),
    quirk("a loss's weights", extra(loss_fct__weight=2)),
    quirk("shards", sharded),
    quirk("names of a compiled module", later=prefixed("_orig_mod.")),
    quirk("names of a parallel module", later=prefixed("module.")),
    quirk("fp16", cast(torch.float16)),
    quirk("bf16", cast(torch.bfloat16)),
    quirk("fp64", cast(torch.float64)),
    quirk(
        "a body without a head",
        tensors(
            lambda own: {
                name: tensor for name, tensor in own.items() if not name.startswith("classifier")
            }
        ),
        refused="no classification head",
    ),
    quirk(
        "a missing layer",
        tensors(
            lambda own: {
                name: tensor
                for name, tensor in own.items()
                if "layer.1.output.dense.bias" not in name
            }
        ),
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
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        refused="is a pickle and is never read",
    ),
    quirk(
        "TensorFlow's weights only",
        lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
        refused="is of TensorFlow",
    ),
    quirk(
        "Flax's weights only",
        lambda folder: (folder / "model.safetensors").rename(folder / "flax_model.msgpack"),
        refused="is of Flax",
    ),
    quirk(
        "another variant of the weights only",
        lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
        refused="another variant",
    ),
    quirk(
        "a PEFT adapter",
        written(adapter_config_json="{}"),
        only("config.json"),
        refused="PEFT adapter",
    ),
    quirk("SetFit", written(config_setfit_json="{}", model_head_pkl="x"), refused="SetFit"),
    # Configs
    quirk("torchscript in config.json", later=config(torchscript=True)),
    quirk(
        "return_dict false in config.json",
        later=config(return_dict=False, output_hidden_states=True),
    ),
    quirk("chunk_size_feed_forward", config(chunk_size_feed_forward=1)),
    quirk("a field that nobody knows", config(my_own_note="of last spring"), versions=("4",)),
    quirk(
        "a field that nobody knows, by a newer transformers",
        config(my_own_note="of last spring"),
        versions=("5",),
        refused="has the field my_own_note",
    ),
    quirk("names of a module within a trainer's", later=prefixed("model.")),
    quirk(
        "a field of a newer transformers",
        config(swirl_attention=True, transformers_version="99.0.0"),
        refused="has the field swirl_attention",
    ),
    quirk("BERT with one type of sentence", type_vocab_size=1),
    quirk("RoBERTa's padding is number 0", family="RoBERTa", pad_token_id=0),
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
        "no limit of tokens anywhere",
        tokenizer_config(model_max_length=10**30),
        family="XLNet",
        resave=False,
        refused="3 to 32,768 can be served",
    ),
    quirk("BERT with pruned heads", pruned, versions=("4",)),
    quirk(
        "RoBERTa without a number for padding",
        family="RoBERTa",
        later=null("pad_token_id"),
        refused="pad_token_id is null",
    ),
    quirk(
        "a hidden_act that nobody knows",
        config(hidden_act="foo"),
        refused="describes no classifier",
    ),
    # Other tasks, other kinds of model
    quirk(
        "token classification",
        config(architectures=["BertForTokenClassification"]),
        refused="is a BertForTokenClassification",
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
        refused="encoder with a decoder behind it",
    ),
    quirk(
        "a family that nobody knows",
        config(model_type="no-such-model"),
        refused="describes no classifier",
    ),
]


def answers(folder: Path, row: Row) -> dict[str, Any]:
    """What the pipeline answers of each text, by label; null where it fails on one."""
    pipe = pipeline(
        "text-classification",
        model=str(folder),
        top_k=None,
        truncation=True,
        **({"function_to_apply": "none"} if row.raw else {}),
    )
    told: list[dict[str, float] | None] = []
    for text in TEXTS:
        try:
            found = pipe(text)
        except Exception as error:
            print(
                f"{row.name}: {text!r}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr
            )
            told.append(None)
            continue
        found = found[0] if isinstance(found[0], list) else found
        told.append({one["label"]: one["score"] for one in found})
    return {"texts": TEXTS, "answers": told, "transformers": transformers.__version__}


def table() -> str:
    """What becomes of each row, as docs/families.md says it and tests/export/test_corpus.py holds
    it.
    """
    lines = ["| checkpoint | family | saved by transformers | outcome |", "|---|---|---|---|"]
    for row in ROWS:
        saved = " and ".join({"4": "4.57", "5": "5.24"}[version] for version in row.versions)
        outcome = "as the pipeline" if row.refused is None else f"refused: {row.refused}"
        lines.append(
            f"| {'plain' if row.name == row.family else row.name} | {row.family} | {saved} |"
            f" {'as a CrossEncoder' if row.raw else outcome} |"
        )
    return "\n".join(lines)


def write_all(out: Path, rows: Sequence[Row] = ROWS) -> Iterator[Path]:
    for place, row in enumerate(rows):
        folder = out / f"{place:02}" / "checkpoint"
        try:
            write_family(folder, BY_NAME[row.family], **row.make)
            for change in row.changes:
                change(folder)
            told = None if row.refused else answers(folder, row)
            for change in row.later:
                change(folder)
        except Exception as error:  # This transformers cannot make it: a row that it has not.
            print(f"{row.name}: {type(error).__name__}: {error}", file=sys.stderr)
            shutil.rmtree(folder.parent)
            continue
        if told is not None:
            (folder.parent / "answers.json").write_text(json.dumps(told))
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
