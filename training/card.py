"""
Writes a classifier's model card from the numbers that its training and evaluation left behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-classification
library_name: transformers
---

# {name}

{what}

| | |
|---|---|
| encoder | BERT, {layers} layers, {hidden} wide, {heads} heads, feed-forward {wide}, {vocabulary:,} WordPieces (uncased), {positions} positions |
| decoder in this file | {decoder} |
| pretraining text | {text} (English Wikipedia before June 2015; public-domain books) |
| pretraining | {steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s on {threads} thread(s) of {device}, {precision} |
| masked-LM loss (nats) | {loss:.3f} over the last 100 steps, {held_out:.3f} on {held_out_sequences} sequences of {held_out_text}; read as in training, so through the random mix where there is a decoder |
| fine-tuning | {source}; {examples:,} examples, {epochs} epochs, {ft_steps:,} steps, {ft_seconds:,.0f} s; loss {ft_loss:.3f} over the last 100 steps |
| accuracy, {dev_examples} dev sentences | **{served}** through the running service; {in_torch:.2%} in torch |

## Made by

```bash
python -m training.pretrain training/configs/{config}.toml --data DATA --out build/training/{config} --threads {threads}
python -m training.finetune --encoder build/training/{config}/checkpoint --task {task} --data DATA --out examples/checkpoints/{name} \\
    --epochs {epochs} --batch-size {batch_size} --learning-rate {learning_rate} --seed {ft_seed} --threads {ft_threads}
python -m training.evaluate examples/checkpoints/{name} --task {task} --data DATA --url http://127.0.0.1:8000 --model {family}
```

`training.json` holds every setting, the sha256 of every text shard and the versions used.

## What it is not

It is one of two twins made to show that a pretraining decoder costs nothing at inference, not to be good at
sentiment: it saw {millions:.0f} M tokens where BERT-base saw 131,000 M (a million steps of 256 × 512). At a
held-out loss of {held_out:.2f} nats it has learned word frequencies and little of their context; what it knows of sentiment comes
mostly from fine-tuning. It was trained once, with one seed, so the difference
between the twins' accuracies says nothing about the recipe. {reconstruction}It knows English film reviews only, inherits
whatever bias its text holds, and truncates after {positions} tokens.
"""

WHAT = {
    "none": "Vanilla BERT-mini, fine-tuned on SST-2: the reference twin.",
    "drbert": "DrBERT-mini, fine-tuned on SST-2: the same encoder, pretrained under an enhanced decoder. "
    "The decoder is still in the file; `python -m export` drops it.",
}
RECONSTRUCTION = (
    "Its decoder is this project's reconstruction of DrBERT (arXiv 2401.15861) from the paper's abstracts and reviews; "
    "its n, p and q are not the paper's. "
)


def write_card(directory: Path, name: str) -> None:
    """Renders README.md in `directory` from its config.json, training.json and, once there, evaluation.json."""
    config = json.loads((directory / "config.json").read_text())
    trained = json.loads((directory / "training.json").read_text())
    pre, fine = trained["pretraining"], trained["finetuning"]
    design = pre["config"]["decoder"]
    evaluation = directory / "evaluation.json"
    served = "not yet measured"
    if evaluation.is_file():
        measured = json.loads(evaluation.read_text())
        served = f"{measured['accuracy']:.2%} ({measured['right']} of {measured['examples']}, {measured['date']})"
    (directory / "README.md").write_text(CARD.format(
        name=name, what=WHAT[design["design"]], layers=config["num_hidden_layers"], hidden=config["hidden_size"],
        heads=config["num_attention_heads"], wide=config["intermediate_size"], vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"], decoder=_describe(design),
        text=", ".join(pre["config"]["data"]["text"]), held_out_text=", ".join(pre["config"]["data"]["held_out"]), steps=pre["steps"], tokens=pre["tokens"], seconds=pre["seconds"],
        threads=pre["threads"], device=pre["device"], precision=pre["precision"], loss=pre["training_loss_last_100"],
        held_out=pre["held_out_loss"], held_out_sequences=pre["held_out_sequences"],
        source=fine["source"], examples=fine["examples"], epochs=fine["epochs"], ft_steps=fine["steps"],
        ft_seconds=fine["seconds"], ft_loss=fine["training_loss_last_100"], dev_examples=fine["dev_examples"],
        in_torch=fine["dev_accuracy_in_torch"], served=served, task=fine["task"], batch_size=fine["batch_size"],
        learning_rate=fine["learning_rate"], ft_seed=fine["seed"], ft_threads=fine["threads"], config=name.removesuffix(f"-{fine['task']}"),
        family=name.partition("-")[0], millions=pre["tokens"] / 1e6,
        reconstruction="" if design["design"] == "none" else RECONSTRUCTION,
    ))


def _describe(design: dict[str, Any]) -> str:
    if design["design"] == "none":
        return "none"
    return (
        f"`{design['design']}`: n = {design['layers']} blocks, p = {design['unmasked_first']}, "
        f"q = {design['decoder_share']}; pretraining only"
    )
