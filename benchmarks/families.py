"""
Compare every model family with BERT: the expected outcome, and the actual one.

    python -m benchmarks families --out benchmarks/families.md      all of them, some minutes
    python -m benchmarks families ELECTRA ConvBERT                  these two

Every row is a tiny classifier with random weights, of transformers' own class and of one size. It
is saved, exported and compared like any other. A family that export refuses is in the table as
refused. The exit code is 65 if an outcome differs from the expected one.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from benchmarks.harness import pages
from command import BadInput, BadUsage, CommandError, Parser
from export.checkpoint.config import plain_functions
from export.graph.variants import RECIPES
from export.pipeline import export
from proof.verdict.identity import compare, headline
from training.decoders import TransformerBlock

SAME = "the same work"
HEAD = "encoder equal, head differs"
OTHER = "they do not do the same work"
REFUSED = "refused"

WORDS = ("good", "bad", "film", "a", "the", "is", "it", "not", "of", "and")
HIDDEN, LAYERS, HEADS, INTERMEDIATE, POSITIONS = 32, 2, 2, 64, 48
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
}


PACKAGES = ("torch", "transformers", "onnx", "openvino")
"""Packages whose versions the outcomes depend on."""


@dataclass(frozen=True)
class Family:
    """A tiny classifier, and the outcome that its comparison with BERT should have."""

    name: str
    expected: str
    """Expected outcome: SAME, HEAD, OTHER, REFUSED or other words of the comparison."""
    reason: str
    """Why that outcome is expected."""
    architecture: str = "Bert"
    """Prefix of the names of transformers' classes."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Config entries that differ from BERT's; None removes an entry that the class lacks."""
    fill: float | None = None
    """Value of every weight; None draws random weights."""
    decoder: bool = False
    """Whether the checkpoint has a pretraining decoder."""
    keep_decoder: bool = False
    """Whether export keeps that decoder."""
    words: Sequence[str] = WORDS
    """Vocabulary of the tokenizer, without its special tokens."""
    max_tokens: int | None = None
    """Length limit in the tokenizer's config."""


REFERENCE = Family("BERT", SAME, "the reference")
FAMILIES = (
    Family("BERT, other weights", SAME, "weights are no work"),
    Family("BERT, all weights 0", SAME, "not even these", fill=0.0),
    Family("BERT, all weights 1", SAME, "nor these", fill=1.0),
    Family(
        "BERT, other dropout",
        SAME,
        "nothing is dropped at inference",
        config={"hidden_dropout_prob": 0.5},
    ),
    Family("DrBERT", SAME, "its decoder is dropped", decoder=True),
    Family("DrBERT, decoder kept", OTHER, "two more layers", decoder=True, keep_decoder=True),
    Family("BERT, 3 labels", HEAD, "a wider last layer", config={"num_labels": 3}),
    Family(
        "BERT, other tokenizer",
        "encoder and head equal, tokenizer not",
        "other tokens of one text",
        words=(*WORDS[:-1], "but"),
    ),
    Family(
        "BERT, told to read 24 tokens",
        "encoder and head equal, max tokens not",
        "texts are cut earlier",
        max_tokens=24,
    ),
    Family("BERT, 64 positions", OTHER, "a longer table", config={"max_position_embeddings": 64}),
    Family("BERT, hidden size 48", OTHER, "wider matrices", config={"hidden_size": 48}),
    Family(
        "BERT, 4 heads", OTHER, "as many weights, other shapes", config={"num_attention_heads": 4}
    ),
    Family("BERT, 3 layers", OTHER, "a layer more", config={"num_hidden_layers": 3}),
    Family("BERT, gelu_new", OTHER, "tanh for erf", config={"hidden_act": "gelu_new"}),
    Family("BERT, relu", OTHER, "another activation", config={"hidden_act": "relu"}),
    Family(
        "ELECTRA",
        HEAD,
        "BERT's encoder; dense and GELU for a pooler",
        "Electra",
        {"embedding_size": HIDDEN},
    ),
    Family(
        "ELECTRA, narrow embeddings",
        OTHER,
        "a projection to the hidden size",
        "Electra",
        {"embedding_size": 16},
    ),
    Family(
        "RoBERTa",
        OTHER,
        "positions counted from the ids, no sentence types",
        "Roberta",
        {"pad_token_id": 0, "type_vocab_size": 1},
    ),
    Family(
        "XLM-RoBERTa", OTHER, "as RoBERTa", "XLMRoberta", {"pad_token_id": 0, "type_vocab_size": 1}
    ),
    Family(
        "CamemBERT", OTHER, "as RoBERTa", "Camembert", {"pad_token_id": 0, "type_vocab_size": 1}
    ),
    Family(
        "data2vec", OTHER, "as RoBERTa", "Data2VecText", {"pad_token_id": 0, "type_vocab_size": 1}
    ),
    Family(
        "DistilBERT",
        OTHER,
        "no sentence types",
        "DistilBert",
        {
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": INTERMEDIATE,
        },
    ),
    Family("ALBERT", OTHER, "narrow embeddings, projected", "Albert", {"embedding_size": 16}),
    Family("MPNet", OTHER, "relative positions as a bias", "MPNet", {"pad_token_id": 0}),
    Family(
        "ConvBERT", OTHER, "convolutions beside attention", "ConvBert", {"embedding_size": HIDDEN}
    ),
    Family(
        "DeBERTa",
        OTHER,
        "attention to content and position apart",
        "Deberta",
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 0,
        },
    ),
    Family(
        "DeBERTa-v2",
        OTHER,
        "attention to content and position apart",
        "DebertaV2",
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 0,
        },
    ),
    Family(
        "MobileBERT",
        OTHER,
        "bottlenecks around every layer",
        "MobileBert",
        {"embedding_size": HIDDEN, "intra_bottleneck_size": 16},
    ),
    Family(
        "SqueezeBERT",
        OTHER,
        "grouped convolutions for matrices",
        "SqueezeBert",
        {"embedding_size": HIDDEN},
    ),
    Family("RoFormer", OTHER, "rotated positions", "RoFormer", {"embedding_size": HIDDEN}),
    Family("Megatron-BERT", OTHER, "LayerNorm before, not after", "MegatronBert"),
    Family(
        "RemBERT",
        OTHER,
        "embeddings projected",
        "RemBert",
        {"input_embedding_size": HIDDEN, "output_embedding_size": HIDDEN},
    ),
    Family(
        "ModernBERT",
        OTHER,
        "rotated positions, gated layers, no biases",
        "ModernBert",
        {
            "pad_token_id": 0,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "reference_compile": False,
        },
    ),
    Family(
        "Nyströmformer",
        REFUSED,
        "it reads texts of one length only",
        "Nystromformer",
        {
            "num_landmarks": 8,
            "segment_means_seq_len": POSITIONS,
        },
    ),
    Family(
        "Funnel",
        REFUSED,
        "the exporter does not know it",
        "Funnel",
        {
            "d_model": HIDDEN,
            "n_head": HEADS,
            "d_head": 16,
            "d_inner": INTERMEDIATE,
            "block_sizes": [1, 1],
            "num_hidden_layers": None,
        },
    ),
    Family(
        "XLNet",
        REFUSED,
        "the exporter does not know it",
        "XLNet",
        {
            "d_model": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "d_inner": INTERMEDIATE,
            "max_position_embeddings": None,
        },
    ),
)


@dataclass(frozen=True)
class Outcome:
    """The actual outcome of a family's comparison with BERT."""

    family: Family
    result: str
    first_difference: str
    """First difference from BERT's graph, or the reason of a refusal; empty if there is none."""

    @property
    def agrees(self) -> bool:
        """Whether the outcome is the expected one."""
        return self.result == self.family.expected


def write_checkpoint(family: Family, folder: Path, seed: int) -> Path:
    """Write a classifier of that family as a Hugging Face checkpoint; return its folder."""
    folder.mkdir(parents=True)
    vocabulary = {
        word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *family.words))
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if family.max_tokens:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"model_max_length": family.max_tokens})
        )

    torch.manual_seed(seed)
    sizes = {"vocab_size": len(vocabulary)} | SIZES | dict(family.config)
    config = getattr(transformers, f"{family.architecture}Config")(
        **{name: size for name, size in sizes.items() if size is not None}
    )
    with plain_functions():
        model = getattr(transformers, f"{family.architecture}ForSequenceClassification")(config)
    if family.fill is not None:
        for parameter in model.parameters():
            nn.init.constant_(parameter, family.fill)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    described = config.to_dict()
    if family.decoder:
        described["pretraining_decoder"] = {"design": "drbert", "layers": 2}
        layers = nn.ModuleDict(
            {
                "layer": nn.ModuleList(
                    TransformerBlock(HIDDEN, HEADS, INTERMEDIATE) for _ in range(2)
                )
            }
        )
        tensors |= {
            f"pretraining_decoder.{name}": tensor for name, tensor in layers.state_dict().items()
        }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors")
    return folder


def compare_all(
    families: Sequence[Family], variants: Sequence[str], report: Callable[[str], None] = print
) -> list[Outcome]:
    """Export the reference and every family, compare them, and report each outcome as a line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _export(REFERENCE, folder / "reference", 0, variants)
        outcomes = []
        for seed, family in enumerate(families, start=1):
            outcomes.append(outcome := _outcome(family, folder, seed, variants))
            expected = "" if outcome.agrees else f", where {family.expected!r} was expected"
            report(f"{family.name}: {outcome.result}{expected}")
    return outcomes


def _outcome(family: Family, folder: Path, seed: int, variants: Sequence[str]) -> Outcome:
    family_folder = folder / str(seed)
    try:
        _export(family, family_folder, seed, variants)
    except CommandError as error:
        return Outcome(family, REFUSED, str(error).replace(f"{folder}/", "").partition(". ")[0])
    result = compare(folder / "reference" / "artifact", family_folder / "artifact")
    # A graph that differs comes first: the other differences follow from it.
    differences = sorted(
        result["differences"],
        key=lambda d: (not d["what"].endswith("encoder"), not d["what"].endswith("head")),
    )
    first = f"{differences[0]['what']}: {differences[0]['detail']}" if differences else ""
    return Outcome(family, headline(result), first)


def _export(family: Family, folder: Path, seed: int, variants: Sequence[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        checkpoint = write_checkpoint(family, folder / "checkpoint", seed)
        export(
            str(checkpoint),
            folder / "artifact",
            variants=variants,
            keep_decoder=family.keep_decoder,
        )


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table, with a sentence before it."""
    rows = []
    for outcome in outcomes:
        family = outcome.family
        result = outcome.result if outcome.agrees else f"**{outcome.result}**"
        difference = outcome.first_difference.replace("|", "/")
        expected = f"{family.expected}: {family.reason}"
        rows.append(f"| {family.name} | {expected} | {result} | {difference} |")
    agreeing = sum(outcome.agrees for outcome in outcomes)
    return "\n".join(
        [
            "Each row is a tiny classifier with random weights, exported and compared with BERT's"
            f" by `proof.verdict.identity`. {agreeing} of {len(outcomes)} came out as expected.",
            "",
            "| family | expected, and why | found | first difference |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Compare the chosen families with BERT; raise BadInput if an outcome is unexpected."""
    parser = Parser(
        prog="python -m benchmarks families",
        description="Compare every family of encoders with BERT.",
    )
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="only these (default: all)")
    parser.add_argument(
        "--variants",
        default="cpu-fp32",
        help=f"comma-separated (default: cpu-fp32; known: {','.join(RECIPES)})",
    )
    parser.add_argument("--out", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    variants = options.variants.split(",")
    known = {family.name: family for family in FAMILIES}
    if unknown := [name for name in options.names if name not in known]:
        raise BadUsage(f"Unknown family {unknown[0]!r}; known are {'; '.join(known)}.")
    if unknown := [name for name in variants if name not in RECIPES]:
        raise BadUsage(f"Unknown variant {unknown[0]!r}; known are {', '.join(RECIPES)}.")
    outcomes = compare_all([known[name] for name in options.names] or FAMILIES, variants)
    text = table(outcomes)
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks", "families", *arguments])
        pages.write(options.out, "Every family against BERT", command, text, packages=PACKAGES)
    else:
        print(text)
    wrong = [outcome for outcome in outcomes if not outcome.agrees]
    if wrong:
        details = [
            f"{outcome.family.name}: {outcome.result}, not {outcome.family.expected}"
            for outcome in wrong
        ]
        raise BadInput(
            f"{len(wrong)} of {len(outcomes)} had an unexpected outcome: {'; '.join(details)}"
        )
    print(f"all {len(outcomes)} as expected")
    return 0
