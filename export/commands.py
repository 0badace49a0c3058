"""
Exports a fine-tuned checkpoint to an artifact that the service can trust.

    python -m export examples/checkpoints/drbert-mini-sst2 artifacts/drbert
    python -m export examples/checkpoints/drbert-mini-sst2 artifacts/drbert --calibration reviews.txt --gate more-reviews.jsonl
    python -m export examples/checkpoints/drbert-mini-sst2 artifacts/drbert-with-decoder --keep-decoder

Drops the pretraining decoder and says what it dropped, compiles the variants, runs each on
real texts against torch, and writes manifest.json last. Nothing half-written is left behind.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput, BadUsage, Parser
from export.attention import mended
from export.checkpoint import Checkpoint, Left, build_model, read_checkpoint
from export.gate import FEWEST_TEXTS, judge
from export.onnx_file import export_onnx, flush_subnormal_weights
from export.reference import PROBES, TEXTS, Reference, TextOrPair
from export.texts import SHIPPED, Labelled, read_texts, without
from export.variants import GATED, RECIPES, UNASKED, Source
from export.verify import engine_here, measure_padding_safety, measure_parity, read_probes, record_self_check
from graphs.canonical import split
from graphs.files import read_graph
from service import cpus
from service.artifact import (
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    ArtifactError,
    Dropped,
    Gate,
    Manifest,
    Parity,
    Task,
    Variant,
    read_manifest,
    sealed,
    sha256,
)
from service.classifier import Classifier
from service.errors import ModelOutputInvalid
from service.runtimes import Inputs, RuntimeUnavailable
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime

TASKS: dict[str, Task] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
# Families that number positions from the padding id on, as RoBERTa does.
POSITIONS_AFTER_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "ibert", "longformer", "mpnet",
)


def export(
    source: str, target: Path, *, variants: Sequence[str] = UNASKED, task: Task | None = None,
    keep_decoder: bool = False, revision: str | None = None,
    calibration: Path = SHIPPED, gate: Path | None = None, agreement: float = 0.99,
) -> Manifest:
    """Writes the artifact of `source` to `target` and returns its manifest.

    A calibrated variant is made with the texts of `calibration`, and passes its gate if it gives the fp32 answer to the
    texts of `gate` that are not among those, with a lower confidence bound of `agreement`; without `gate` it is ungated.
    """
    _check_target(target)
    checkpoint = read_checkpoint(source, revision)
    model = build_model(checkpoint, keep_decoder)
    left = checkpoint.left_out()
    config: Any = model.config
    labels = _labels(checkpoint.directory, config)
    calibrating = read_texts(calibration, labels)
    gating = [] if gate is None else without(read_texts(gate, labels), [item.text for item in calibrating])
    _say_what_is_dropped(checkpoint, left, keep_decoder)

    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        print("exporting the graph", flush=True)
        checkpoint.write_tokenizer(folder / "tokenizer.json")
        export_onnx(mended(model), folder / "model.onnx")
        flushed = flush_subnormal_weights(folder / "model.onnx")
        if flushed:
            print(f"sets {flushed:,} subnormal weights to zero: they change no answer and slow processors down", flush=True)
        reference = Reference(model, folder / "tokenizer.json", _max_tokens(checkpoint, config))
        inputs: list[Inputs] = []
        if any(RECIPES[name].calibrated for name in variants):
            print(f"calibrating with {len(calibrating)} texts of {'those that come along' if calibration == SHIPPED else calibration}", flush=True)
            inputs = _calibration_inputs(folder, config, reference, calibrating)
        for name in variants:
            RECIPES[name].build(Source(folder, config, inputs))
        manifest = _describe(folder, checkpoint, model, variants, task, left, keep_decoder)
        manifest = manifest.model_copy(update={"flushed_weights": flushed})
        manifest = _verify(folder, manifest, reference, gating, agreement)
        # Written last: a folder without a manifest is not an artifact.
        manifest = sealed(manifest)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        _take_the_place_of(target, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _labels(directory: Path, config: Any) -> list[str]:
    """What the classes are called; BadInput if two are called the same."""
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    for i, label in enumerate(labels):
        if (first := labels.index(label)) < i:
            raise BadInput(f"{directory}: the classes {first} and {i} are both called {label!r}; name them differently in its config.json (id2label).")
    return labels


def _take_the_place_of(target: Path, folder: Path) -> None:
    """Renames the new artifact in; the old one goes only when the new one is there."""
    old = folder.with_name(f"{folder.name}-old")
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path) -> None:
    """Only an artifact, whole or broken, or an empty folder is written over."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        known = {*read_manifest(target).files, MANIFEST}
    except ArtifactError:
        known = set()
    if not target.is_dir() or any(path.name not in known for path in target.iterdir()):
        raise BadUsage(f"{target} exists and is not an artifact and nothing else; remove it or choose another place.")


def _say_what_is_dropped(checkpoint: Checkpoint, left: Left, keep_decoder: bool) -> None:
    name = checkpoint.directory
    if keep_decoder:
        print(f"{name}: KEEPS its {left.layers} decoder layers as encoder layers. A control for the proof: its answers mean nothing.")
    elif left.parameters:
        print(
            f"{name}: drops the {left.design} decoder: {left.layers} layers, {left.parameters:,} parameters, "
            f"{left.share_of_file:.1%} of the file."
        )
    else:
        print(f"{name}: holds no decoder; nothing to drop.")
    if left.other_tensors:
        print(f"{name}: drops {len(left.other_tensors)} tensors of a pretraining head ({left.other_tensors[0]}, …).")


def _describe(
    folder: Path, checkpoint: Checkpoint, model: Any, variants: Sequence[str], task: Task | None, left: Left, keep_decoder: bool
) -> Manifest:
    config = model.config
    encoder, head = split(read_graph(folder / "model.onnx"))
    built: dict[str, Variant] = {}
    for name in variants:
        recipe = RECIPES[name]
        own = split(read_graph(folder / recipe.files[0]))
        built[name] = Variant(
            runtime=recipe.runtime, precision=recipe.precision, files=list(recipe.files),
            encoder_digest=own[0].digest, head_digest=own[1].digest,
            weight_bytes=own[0].weight_bytes + own[1].weight_bytes,
            parity=None, gate=Gate(status="ungated", reason="not yet verified"),
        )
    dropped = None
    if left.parameters and not keep_decoder:
        dropped = Dropped(
            design=left.design, layers=left.layers, parameters=left.parameters, share_of_file=round(left.share_of_file, 6)
        )
    inputs = _graph_inputs(folder / "model.onnx")
    return Manifest(
        schema_version=SCHEMA_VERSION, name=checkpoint.directory.resolve().name, family=config.model_type,
        task=task or _task(config), labels=_labels(checkpoint.directory, config),
        takes_pairs=_takes_pairs(inputs, config),
        max_tokens=_max_tokens(checkpoint, config), inputs=inputs,
        encoder_digest=encoder.digest, head_digest=head.digest, tokenizer_digest=sha256(folder / "tokenizer.json"),
        parameters=sum(p.numel() for p in model.parameters()), flops_per_token=encoder.flops_per_token(),
        padding_safe=True, dropped=dropped, kept_decoder_layers=left.layers if keep_decoder else 0, variants=built,
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
        seal="",
        provenance={
            "checkpoint": checkpoint.directory.resolve().name,
            "checkpoint_sha256": sha256(checkpoint.directory / "model.safetensors"),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
        } | {package: importlib.metadata.version(package) for package in _made_by(variants)},
    )


def _made_by(variants: Sequence[str]) -> list[str]:
    """The packages whose versions an artifact depends on."""
    packages = ["torch", "transformers", "optimum", "onnx", "openvino", "nncf"]
    if any(RECIPES[name].runtime != "openvino" for name in variants):
        installed = {distribution.name for distribution in importlib.metadata.distributions()}
        packages += [name for name in ("onnxruntime", "onnxruntime-gpu") if name in installed]
    return packages


def _takes_pairs(inputs: Sequence[str], config: Any) -> bool:
    return "token_type_ids" not in inputs or config.type_vocab_size > 1


def _calibration_inputs(folder: Path, config: Any, reference: Reference, texts: Sequence[Labelled]) -> list[Inputs]:
    """What the graph in `folder` is given of each text that it can read."""
    names = _graph_inputs(folder / "model.onnx")
    usable = [item.text for item in texts if isinstance(item.text, str) or _takes_pairs(names, config)]
    if not usable:
        raise BadInput("The calibration texts are pairs, and this model reads single texts; give others with --calibration.")
    encoded = [reference.encode(text) for text in usable]
    return [{name: one.get(name, np.zeros_like(one["input_ids"])) for name in names} for one in encoded]


def _verify(folder: Path, manifest: Manifest, reference: Reference, gating: Sequence[Labelled], wanted: float) -> Manifest:
    """Runs every variant against torch; cpu-fp32 must agree, a reduced one is marked by what it does."""
    texts: list[TextOrPair] = [text for text in TEXTS if isinstance(text, str) or manifest.takes_pairs]
    threads = cpus.usable()
    try:
        safe = measure_padding_safety(Artifact(folder, manifest), folder / "model.onnx", texts, threads)
    except ModelOutputInvalid as error:
        raise BadInput(f"The model cannot be served: {error} Its weights may overflow.") from None
    manifest = manifest.model_copy(update={"padding_safe": safe})
    if not safe:
        print("answers depend on padding: the service will batch equal lengths only")
    manifest = manifest.model_copy(update={"probes": read_probes(Artifact(folder, manifest), [text for text in PROBES if text in texts], threads)})
    verified = {}
    for name, variant in manifest.variants.items():
        try:
            engine = engine_here(Artifact(folder, manifest), name)
            parity = measure_parity(Artifact(folder, manifest), engine, reference, texts, RECIPES[name].tolerance, threads)
            gate = _gate_by_parity(name, parity, engine.runtime) if parity.tolerance is not None else (
                _gate_by_labels(Artifact(folder, manifest), name, gating, wanted, threads)
            )
            self_check = record_self_check(Artifact(folder, manifest), engine, reference, manifest.probes, threads)
        except (RuntimeUnavailable, ModelOutputInvalid) as error:
            if variant.precision == "f32":
                raise BadInput(f"{name} cannot be run: {error}") from None
            parity, self_check, gate = None, None, Gate(status="ungated", reason=f"not verified: {error}")
        verified[name] = variant.model_copy(update={"parity": parity, "gate": gate, "self_check": self_check})
        print(f"{name}: {'FAILED its gate' if gate.status == 'failed' else gate.status}: {gate.reason}", flush=True)
    return manifest.model_copy(update={"variants": verified})


def _gate_by_parity(name: str, parity: Parity, engine: str) -> Gate:
    elsewhere = "; run by onnxruntime on the CPU, not yet on a GPU" if engine != RECIPES[name].runtime else ""
    found = (
        f"{parity.texts} texts, labels agree {parity.label_agreement:.1%}, largest difference of a probability "
        f"{parity.max_probability_difference:.1e} (at most {parity.tolerance:.0e}){elsewhere}"
    )
    if parity.tolerance is None or parity.max_probability_difference <= parity.tolerance:
        return Gate(status="passed", reason=found)
    if RECIPES[name].precision == "f32":
        raise BadInput(f"{name} does not reproduce the checkpoint: {found}. This graph cannot be trusted.")
    return Gate(status="failed", reason=found)


def _gate_by_labels(artifact: Artifact, name: str, texts: Sequence[Labelled], wanted: float, threads: int) -> Gate:
    usable = [item for item in texts if isinstance(item.text, str) or artifact.manifest.takes_pairs]
    if not usable:
        return Gate(status="ungated", reason=f"no texts to gate it with; give --gate FILE with at least {FEWEST_TEXTS:,}")
    exact, reduced = (
        Classifier(artifact, load(artifact, Choice(variant, "openvino", "verification"), threads)) for variant in ("cpu-fp32", name)
    )
    assert isinstance(reduced.runtime, OpenVinoRuntime)
    return judge(exact, reduced, artifact, usable, wanted, reduced.runtime.rest)


def _task(config: Any) -> Task:
    if config.problem_type is not None:
        return TASKS[config.problem_type]
    return "regression" if config.num_labels == 1 else "single_label"


def _max_tokens(checkpoint: Checkpoint, config: Any) -> int:
    """The smaller of what the tokenizer and the positions allow."""
    positions = config.max_position_embeddings
    if config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    path = checkpoint.directory / "tokenizer_config.json"
    try:
        told = json.loads(path.read_bytes()).get("model_max_length") if path.is_file() else None
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from None
    return int(min(positions, told)) if told else int(positions)


def _graph_inputs(path: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m export", description="Export a fine-tuned checkpoint to a verified artifact.")
    parser.add_argument("checkpoint", help="a Hugging Face folder with safetensors, or a hub id")
    parser.add_argument("artifact", type=Path, help="the folder to write")
    parser.add_argument("--variants", help=f"comma-separated, of {','.join(RECIPES)} (default: {','.join(UNASKED)}; with --gate, also cpu-int8)")
    parser.add_argument("--calibration", type=Path, default=SHIPPED, help="texts of your domain to calibrate cpu-int8 with, one a line (default: some that come along)")
    parser.add_argument("--gate", type=Path, help=f"at least {FEWEST_TEXTS:,} other texts, one a line, or .jsonl with text and label: cpu-int8 must give them fp32's answers")
    parser.add_argument("--agreement", type=float, default=0.99, help="the lower confidence bound of the share that must agree (default: %(default)s)")
    parser.add_argument("--task", choices=sorted(set(TASKS.values())), help="overrides the checkpoint's problem_type")
    parser.add_argument("--revision", help="the revision of a hub id")
    parser.add_argument("--keep-decoder", action="store_true", help="keep the decoder as encoder layers: the proof's control")
    given = parser.parse_args(arguments)
    variants = given.variants.split(",") if given.variants else list(UNASKED if given.gate is None else GATED)
    if not 0 < given.agreement < 1:
        raise BadUsage(f"--agreement {given.agreement} is no share; it lies between 0 and 1.")
    for name in variants:
        if name not in RECIPES:
            raise BadUsage(f"Unknown variant {name!r}; known are {', '.join(RECIPES)}.")
    manifest = export(
        given.checkpoint, given.artifact, variants=variants, task=given.task,
        keep_decoder=given.keep_decoder, revision=given.revision,
        calibration=given.calibration, gate=given.gate, agreement=given.agreement,
    )
    print(
        f"{given.artifact}: {manifest.family}, {manifest.parameters:,} parameters, {manifest.max_tokens} tokens, "
        f"encoder {manifest.encoder_digest[:12]}, head {manifest.head_digest[:12]}"
    )
    return 0
