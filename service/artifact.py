"""
The contract between export and service: a folder with a manifest.json that accounts for every byte in it.

The reader owns the schema. An artifact is read whole or refused: an unknown field,
a file that is missing, changed or not listed is an ArtifactError that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from command import UNAVAILABLE, BadInput
from service import cpus

SCHEMA_VERSION: Literal[3] = 3
READABLE_VERSIONS = (2, 3)
"""Version 2 has no self-check: what was exported with it is served unchecked."""
MANIFEST = "manifest.json"

Task = Literal["single_label", "multi_label", "regression"]
Precision = Literal["f32", "bf16", "f16", "i8"]


class ArtifactError(BadInput):
    """The folder is not an artifact this service can trust."""


class ArtifactMissing(ArtifactError):
    """There is no artifact where one was named."""

    exit_code = UNAVAILABLE


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Parity(_Part):
    """How far a variant's answers are from the reference's, on real texts."""

    texts: int
    max_probability_difference: float
    tolerance: float | None
    """The largest difference that is taken for rounding; None for a variant that its gate judges."""
    label_agreement: float
    """Share of the texts given the reference's label, 0 to 1."""


Rest = Literal["f32", "bf16"]


class Agreement(_Part):
    """How often a variant gave the fp32 variant's label, on texts it was not calibrated with."""

    texts: int
    agreeing: int
    lower_bound: float
    """Of the share that agrees, at 95 % confidence (Clopper-Pearson, one-sided)."""
    wanted: float
    """What the lower bound has to reach."""
    accuracy: float | None
    """Share of labelled texts answered rightly; None where none are labelled."""
    accuracy_of_fp32: float | None
    rest: Rest | None = None
    """In which precision that was found for what the variant does not quantise; it is served in no lower one. None: in its own."""


class Gate(_Part):
    """Whether `auto` may choose the variant: only one that passed."""

    status: Literal["passed", "failed", "ungated"]
    reason: str
    agreement: Agreement | None = None


class Probe(_Part):
    """A text of the self-check, and what the model reads of it."""

    text: str
    text_pair: str | None
    input_ids: list[int] = Field(min_length=1)
    token_type_ids: list[int]


class SelfCheck(_Part):
    """What a variant answered to the probes where it was exported."""

    logits: dict[Literal["f32", "bf16", "f16"], list[list[float]]]
    """(probes, labels) by the precision of what the variant does not quantise: an int8 graph computes the rest in f32 or in bf16."""
    tolerance: float = Field(gt=0)
    """The largest difference of a logit that may be rounding of another processor."""


class Variant(_Part):
    """One compiled form of the model."""

    runtime: Literal["openvino", "onnxruntime", "cuda", "tensorrt"]
    precision: Precision
    files: list[str] = Field(min_length=1)
    """The first is the one to load."""
    encoder_digest: str
    head_digest: str
    weight_bytes: int
    parity: Parity | None
    """None where the exporting host could not run the variant; its gate then says so."""
    gate: Gate
    self_check: SelfCheck | None = None
    """None where the exporting host could not run the variant, or was of an earlier version."""

    @property
    def lowest_rest(self) -> Rest | None:
        """The lowest precision for what the variant does not quantise: that of its gate or, ungated, of its self-check; None: any."""
        if self.gate.agreement is not None:
            return self.gate.agreement.rest
        return "f32" if self.self_check is not None and "bf16" not in self.self_check.logits else None


class Dropped(_Part):
    """What export left out of the checkpoint."""

    design: str
    layers: int
    parameters: int
    share_of_file: float


class Manifest(_Part):
    schema_version: Literal[2, 3]
    name: str
    family: str
    task: Task
    labels: list[str] = Field(min_length=1)
    takes_pairs: bool
    max_tokens: int = Field(gt=2)
    inputs: list[str]
    encoder_digest: str
    head_digest: str
    tokenizer_digest: str
    parameters: int
    flops_per_token: int
    padding_safe: bool
    """False: answers depend on how far a text is padded, so only equal lengths share a batch."""
    dropped: Dropped | None
    flushed_weights: int = 0
    """Subnormal weights that export set to zero: they change no answer, and processors multiply them up to a hundred times slower."""
    probes: list[Probe] = []
    """Texts of the self-check."""
    kept_decoder_layers: int
    """Above 0 in the proof's positive control, whose answers mean nothing."""
    variants: dict[str, Variant] = Field(min_length=1)
    files: dict[str, str]
    """sha256 of every file beside the manifest."""
    provenance: dict[str, str]
    seal: str
    """sha256 of all the above; see seal_of."""

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str]) -> list[str]:
        # Whoever answers by name would merge them.
        twice = next((label for label, times in Counter(labels).items() if times > 1), None)
        if twice is not None:
            raise ValueError(f"two are called {twice!r}; name every class of the checkpoint differently and export it again")
        return labels

    @model_validator(mode="after")
    def _files_are_known(self) -> Manifest:
        for name in self.files:
            if Path(name).name != name or name == MANIFEST:
                raise ValueError(f"{name!r} is no plain file name")
        if self.tokenizer_digest != self.files.get("tokenizer.json"):
            raise ValueError("tokenizer_digest is not the digest of tokenizer.json")
        used = {"tokenizer.json": "tokenizer"} | {f: v for v, variant in self.variants.items() for f in variant.files}
        for name, user in used.items():
            if name not in self.files:
                raise ValueError(f"{user} uses {name}, which files does not list")
        return self


@dataclass(frozen=True)
class Artifact:
    """A verified folder and what its manifest says."""

    directory: Path
    manifest: Manifest
    digest: str = ""
    """sha256 of the manifest as it was read, which holds the sha256 of everything else."""

    def path(self, name: str) -> Path:
        return self.directory / name


def read_artifact(directory: Path) -> Artifact:
    """The artifact in `directory`, every file checked against the manifest; else an ArtifactError."""
    manifest = read_manifest(directory)
    digest = sha256(directory / MANIFEST)
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    for name in sorted(manifest.files.keys() - present):
        raise ArtifactError(f"{directory} lacks {name}, which its manifest lists; export it again.")
    for name in sorted(present - manifest.files.keys()):
        raise ArtifactError(f"{directory} holds {name}, which its manifest does not list; remove it or export again.")
    # hashlib lets go of the interpreter, and a large artifact's files are half of a start's time.
    with ThreadPoolExecutor(cpus.usable(), thread_name_prefix="sha256") as hashing:
        digests = hashing.map(sha256, (directory / name for name in manifest.files))
    for (name, wanted), found in zip(manifest.files.items(), digests, strict=True):
        if found != wanted:
            raise ArtifactError(
                f"{directory / name} has changed since export: sha256 {found[:12]}…, the manifest says {wanted[:12]}…; "
                "export it again."
            )
    return Artifact(directory, manifest, digest)


def read_manifest(directory: Path) -> Manifest:
    if not directory.is_dir():
        raise ArtifactMissing(f"{directory} does not exist; `python -m export CHECKPOINT {directory}` makes it.")
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactMissing(f"{directory} has no {MANIFEST}; export writes it last, so run export again.")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}.") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version not in READABLE_VERSIONS:
        raise ArtifactError(f"{path}: schema_version is {version!r}, this service reads {' and '.join(map(str, READABLE_VERSIONS))}; export it again.")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise ArtifactError(f"{path}: {where}: {first['msg']}.") from None
    if manifest.seal != seal_of(values):
        raise ArtifactError(f"{path} has changed since export: its fields do not give its seal; export it again.")
    return manifest


def seal_of(values: Mapping[str, Any]) -> str:
    """sha256 of a manifest's fields as they stand in its file, in canonical JSON, the seal itself left out."""
    fields = {name: value for name, value in values.items() if name != "seal"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"seal": seal_of(manifest.model_dump(mode="json"))})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
