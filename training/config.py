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

DESIGNS = ("none", "drbert")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Data:
    text: list[str]
    held_out: list[str]
    vocabulary_size: int = 8192
    sequence_length: int = 128


@dataclass(frozen=True)
class Encoder:
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Decoder:
    design: str = "none"
    layers: int = 0
    unmasked_first: float = 1.0
    decoder_share: float = 1.0


@dataclass(frozen=True)
class Optimisation:
    steps: int
    batch_size: int
    peak_learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    mask_rate: float = 0.15
    precision: str = "auto"
    seed: int = 0
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Config:
    data: Data
    encoder: Encoder
    optimisation: Optimisation
    decoder: Decoder = field(default_factory=Decoder)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_config(path: Path) -> Config:
    """The run that the file describes; BadInput or Unavailable names what is wrong in it."""
    tables = _read_tables(path)
    sections = {"data": Data, "encoder": Encoder, "decoder": Decoder, "optimisation": Optimisation}
    unknown = sorted(tables.keys() - sections.keys())
    if unknown:
        raise BadInput(f"{path}: unknown section [{unknown[0]}]; known are {', '.join(sections)}.")
    parts = {name: _build(cls, tables.get(name, {}), f"{path}: [{name}]") for name, cls in sections.items()}
    config = Config(**parts)
    _check(config, path)
    return config


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise Unavailable(f"{path} does not exist; training/configs holds the ones that come along.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}.") from None
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    merged = _read_tables(path.parent / parent)
    for name, section in tables.items():
        merged[name] = {**merged.get(name, {}), **section}
    return merged


def _build(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            raise BadInput(f"{where} has no key {name!r}; known are {', '.join(fields)}.")
        wanted = str(fields[name].type)
        fits = {"int": isinstance(value, int), "float": isinstance(value, int | float), "str": isinstance(value, str)}
        if not fits.get(wanted, isinstance(value, list)) or isinstance(value, bool):
            raise BadInput(f"{where} {name} = {value!r} is not of type {wanted}.")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING:
            raise BadInput(f"{where} lacks the key {name!r}.")
    return cls(**values)


def _check(config: Config, path: Path) -> None:
    encoder, decoder, run = config.encoder, config.decoder, config.optimisation
    if encoder.hidden_size % encoder.heads:
        raise BadInput(f"{path}: hidden_size {encoder.hidden_size} is no multiple of heads {encoder.heads}.")
    if decoder.design not in DESIGNS:
        raise BadInput(f"{path}: decoder design {decoder.design!r} is unknown; known are {', '.join(DESIGNS)}.")
    if (decoder.design == "none") != (decoder.layers == 0):
        raise BadInput(f"{path}: decoder design {decoder.design!r} does not go with layers = {decoder.layers}.")
    for name, value in (("unmasked_first", decoder.unmasked_first), ("decoder_share", decoder.decoder_share)):
        if not 0 <= value <= 1:
            raise BadInput(f"{path}: [decoder] {name} = {value} is no probability.")
    if run.precision not in PRECISIONS:
        raise BadInput(f"{path}: precision {run.precision!r} is unknown; known are {', '.join(PRECISIONS)}.")
    if not 0 < run.mask_rate < 1:
        raise BadInput(f"{path}: [optimisation] mask_rate = {run.mask_rate} is not between 0 and 1.")
    if not config.data.vocabulary_size <= 2**16:
        raise BadInput(f"{path}: vocabulary_size {config.data.vocabulary_size} does not fit 16-bit ids.")
