"""
What a pretraining run is told: one small TOML file an experiment, read once.

A file may name another it extends and then holds only the differences. An unknown
key, a wrong type or a value that cannot work is refused by name.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command import BadInput, Unavailable

FAMILIES = ("bert", "convbert", "electra")
OBJECTIVES = ("mlm", "rtd")
DESIGNS = ("none", "plain", "gua", "mix", "drbert", "emd", "mae")
INITIALISATIONS = ("bert", "neighbours")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Data:
    held_out: list[str]
    """Shards below the data folder that are never trained on."""
    text: list[str] = field(default_factory=list)
    """Shards below the data folder, as glob patterns; or none of them and a dataset."""
    dataset: str = ""
    """A dataset's name on the Hugging Face hub, or a folder that `datasets` can load."""
    dataset_config: str = ""
    dataset_split: str = "train"
    text_column: str = "text"
    tokenizer: str = ""
    """A tokenizer.json below the data folder; without one, WordPiece is learned from the text."""
    vocabulary_size: int = 8192
    sequence_length: int = 128


@dataclass(frozen=True)
class Encoder:
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    family: str = "bert"
    embedding_size: int = 0
    """Width of the embeddings; 0 means hidden_size. BERT knows no other."""
    kernel_size: int = 9
    """ConvBERT's span, in tokens."""
    groups: int = 1
    """Groups of ConvBERT's feed-forward layers."""
    dropout: float = 0.0
    initialisation: str = "bert"
    """BERT's normal(0, 0.02), or "neighbours", with which short runs learn from context
    (neighbours.py).
    """


@dataclass(frozen=True)
class Decoder:
    design: str = "none"
    layers: int = 0
    """Blocks on top of the encoder; for emd, passes through the encoder's own last layer."""
    unmasked_first: float = 1.0
    """p: the share of masked positions that the first block may attend to (gua, drbert)."""
    decoder_share: float = 1.0
    """q: the probability that a position is answered by the decoder (mix, drbert)."""


@dataclass(frozen=True)
class Objective:
    name: str = "mlm"
    mask_rate: float = 0.15
    whole_words: bool = False
    generator_width: float = 0.25
    """The generator's width as a share of the encoder's (rtd)."""
    detection_weight: float = 50.0
    """What a nat of the detector's loss counts beside one of the generator's (rtd)."""


@dataclass(frozen=True)
class Optimisation:
    steps: int
    batch_size: int
    """Sequences a step, over all processes and accumulated parts together."""
    peak_learning_rate: float
    warmup_steps: int
    accumulate: int = 1
    """In how many parts a process computes its share of a step."""
    beta2: float = 0.98
    """AdamW's second moment; RoBERTa's value, ELECTRA and ConvBERT have 0.999."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Config:
    data: Data
    encoder: Encoder
    optimisation: Optimisation
    objective: Objective = field(default_factory=Objective)
    decoder: Decoder = field(default_factory=Decoder)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


SECTIONS = {
    "data": Data,
    "encoder": Encoder,
    "objective": Objective,
    "decoder": Decoder,
    "optimisation": Optimisation,
}


def read_config(path: Path) -> Config:
    """The run that the file describes; BadInput or Unavailable names what is wrong in it."""
    tables = _read_tables(path)
    unknown = sorted(tables.keys() - SECTIONS.keys())
    if unknown:
        raise BadInput(f"{path}: unknown section [{unknown[0]}]; known are {', '.join(SECTIONS)}.")
    return _usable(
        Config(
            **{
                name: _build(cls, tables.get(name, {}), f"{path}: [{name}]")
                for name, cls in SECTIONS.items()
            }
        ),
        path,
    )


def with_optimisation(config: Config, told: dict[str, Any], path: Path) -> Config:
    """The same run, but for what is `told` of its optimisation in the file `path`; BadInput as in
    read_config.
    """
    run = _build(Optimisation, {**dataclasses.asdict(config.optimisation), **told}, str(path))
    return _usable(dataclasses.replace(config, optimisation=run), path)


def _usable(config: Config, path: Path) -> Config:
    for wrong in _complaints(config):
        raise BadInput(f"{path}: {wrong}")
    return config


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unavailable(
            f"{path} does not exist; training/configs holds the ones that come along."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}.") from None
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    merged = _read_tables(path.parent / parent)
    for name, section in tables.items():
        if not isinstance(section, dict):
            raise BadInput(f"{path}: {name} = {section!r} stands in no section.")
        merged[name] = {**merged.get(name, {}), **section}
    return merged


def _build(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            raise BadInput(f"{where} has no key {name!r}; known are {', '.join(fields)}.")
        if not _fits(value, wanted := str(fields[name].type)):
            raise BadInput(f"{where} {name} = {value!r} is not of type {wanted}.")
    for name, f in fields.items():
        if (
            name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise BadInput(f"{where} lacks the key {name!r}.")
    return cls(**values)


def _fits(value: object, wanted: str) -> bool:
    if wanted == "bool" or isinstance(value, bool):
        return wanted == "bool" and isinstance(value, bool)
    if wanted == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if wanted == "float":
        return isinstance(value, int | float)
    return isinstance(value, {"int": int, "str": str}[wanted])


def _complaints(config: Config) -> list[str]:
    """What cannot work, each with the value and the limit."""
    data, encoder, objective, decoder, run = (
        config.data,
        config.encoder,
        config.objective,
        config.decoder,
        config.optimisation,
    )
    named = [
        ("encoder family", encoder.family, FAMILIES),
        ("objective", objective.name, OBJECTIVES),
        ("decoder design", decoder.design, DESIGNS),
        ("precision", run.precision, PRECISIONS),
        ("initialisation", encoder.initialisation, INITIALISATIONS),
    ]
    wrong = [
        f"{what} {value!r} is unknown; known are {', '.join(known)}."
        for what, value, known in named
        if value not in known
    ]
    counts = {
        "layers": encoder.layers,
        "hidden_size": encoder.hidden_size,
        "heads": encoder.heads,
        "intermediate_size": encoder.intermediate_size,
        "groups": encoder.groups,
        "kernel_size": encoder.kernel_size,
        "steps": run.steps,
        "batch_size": run.batch_size,
        "accumulate": run.accumulate,
        "checkpoint_every": run.checkpoint_every,
    }
    wrong += [f"{what} = {value} is not 1 at least." for what, value in counts.items() if value < 1]
    if wrong:
        return wrong
    checks = [
        (
            bool(data.text) != bool(data.dataset),
            "[data] takes either text (shards) or dataset (a name), not both and not neither.",
        ),
        (
            data.vocabulary_size <= 2**16,
            f"vocabulary_size {data.vocabulary_size} does not fit 16-bit ids.",
        ),
        (
            encoder.hidden_size % encoder.heads == 0,
            f"hidden_size {encoder.hidden_size} is no multiple of heads {encoder.heads}.",
        ),
        (
            encoder.family != "bert" or encoder.embedding_size in (0, encoder.hidden_size),
            (
                "BERT's embeddings are as wide as the encoder; embedding_size ="
                f' {encoder.embedding_size} needs family "electra" or "convbert".'
            ),
        ),
        (
            encoder.family != "convbert" or encoder.heads % 2 == 0,
            f"ConvBERT halves its heads; heads = {encoder.heads} is odd.",
        ),
        (
            encoder.family != "convbert" or encoder.kernel_size % 2 == 1,
            f"ConvBERT's kernel_size = {encoder.kernel_size} has no middle; take an odd one.",
        ),
        (
            encoder.groups == 1 or encoder.family == "convbert",
            f'groups = {encoder.groups} needs family "convbert".',
        ),
        (
            encoder.hidden_size % encoder.groups == 0,
            f"hidden_size {encoder.hidden_size} is no multiple of groups {encoder.groups}.",
        ),
        (
            (decoder.design == "none") == (decoder.layers == 0),
            f"decoder design {decoder.design!r} does not go with layers = {decoder.layers}.",
        ),
        (
            decoder.design not in ("emd", "mae") or encoder.family == "bert",
            (
                f"the {decoder.design} decoder reaches into BERT's own layers; family"
                f" {encoder.family!r} has none of that kind."
            ),
        ),
        (
            decoder.design in ("gua", "drbert") or decoder.unmasked_first == 1,
            (
                f"decoder design {decoder.design!r} unmasks nothing gradually; unmasked_first"
                " belongs to gua and drbert."
            ),
        ),
        (
            decoder.design in ("mix", "drbert") or decoder.decoder_share == 1,
            (
                f"decoder design {decoder.design!r} mixes nothing; decoder_share belongs to mix and"
                " drbert."
            ),
        ),
        (
            objective.name == "mlm" or decoder.design == "none",
            (
                f"replaced-token detection knows no decoder; design {decoder.design!r} needs"
                ' objective "mlm".'
            ),
        ),
        (
            objective.name == "mlm" or encoder.family != "bert",
            (
                "replaced-token detection shares embeddings with a narrower generator; take family"
                ' "electra" or "convbert".'
            ),
        ),
        (
            encoder.groups == 1
            or round(encoder.hidden_size * objective.generator_width) % encoder.groups == 0
            or objective.name == "mlm",
            (
                f"the generator's width, {objective.generator_width} of {encoder.hidden_size}, is"
                f" no multiple of groups {encoder.groups}."
            ),
        ),
        (
            encoder.initialisation == "bert" or encoder.family != "convbert",
            (
                'initialisation "neighbours" is for BERT and ELECTRA; ConvBERT\'s convolution sees'
                " neighbours already."
            ),
        ),
        (
            encoder.initialisation == "bert" or encoder.embedding_size in (0, encoder.hidden_size),
            (
                'initialisation "neighbours" needs embeddings as wide as the encoder;'
                f" embedding_size = {encoder.embedding_size}, hidden_size = {encoder.hidden_size}."
            ),
        ),
        (
            encoder.initialisation == "bert" or data.sequence_length <= encoder.hidden_size,
            (
                'initialisation "neighbours" tells as many positions apart as there are columns;'
                f" sequence_length = {data.sequence_length}, hidden_size = {encoder.hidden_size}."
            ),
        ),
        (
            encoder.initialisation == "bert" or encoder.hidden_size // encoder.heads % 2 == 0,
            (
                'initialisation "neighbours" pairs the columns of a head; hidden_size'
                f" {encoder.hidden_size} over heads {encoder.heads} is odd."
            ),
        ),
        (data.sequence_length >= 8, f"sequence_length = {data.sequence_length} is below 8."),
        (
            run.warmup_steps < run.steps,
            f"warmup_steps = {run.warmup_steps} leaves nothing of {run.steps} steps.",
        ),
        (run.seed >= 0, f"seed = {run.seed} is negative."),
        (0 <= encoder.dropout < 1, f"dropout = {encoder.dropout} is no probability below 1."),
        (
            objective.name == "mlm" or round(encoder.hidden_size * objective.generator_width) >= 2,
            (
                f"generator_width = {objective.generator_width} of hidden_size"
                f" {encoder.hidden_size} leaves no generator."
            ),
        ),
        (
            0 < objective.mask_rate < 1,
            f"[objective] mask_rate = {objective.mask_rate} is not between 0 and 1.",
        ),
        (
            0 < objective.generator_width <= 1,
            (
                f"[objective] generator_width = {objective.generator_width} is no share of the"
                " encoder's width."
            ),
        ),
        (
            0 <= decoder.unmasked_first <= 1,
            f"[decoder] unmasked_first = {decoder.unmasked_first} is no probability.",
        ),
        (
            0 <= decoder.decoder_share <= 1,
            f"[decoder] decoder_share = {decoder.decoder_share} is no probability.",
        ),
        (
            run.batch_size % run.accumulate == 0,
            f"batch_size {run.batch_size} is no multiple of accumulate {run.accumulate}.",
        ),
    ]
    return [message for holds, message in checks if not holds]
