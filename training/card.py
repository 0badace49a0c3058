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
| encoder | {family}, {layers} layers, {hidden} wide, {heads} heads, feed-forward {wide}, \
{vocabulary:,} WordPieces (uncased), {positions} positions |
| decoder in this file | {decoder} |
| pretraining text | {text} |
| pretraining | {objective}; {steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s by the clock on \
{threads} thread(s) of {device}, {precision} |
| pretraining loss (nats) | {loss:.3f} over the last 100 steps, {held_out:.3f} on \
{held_out_sequences} sequences of {held_out_text}; read as in training, so through the random mix \
where a decoder is mixed in |
| fine-tuning | {source}; {examples:,} examples, {epochs} epochs, {ft_steps:,} steps, \
{ft_seconds:,.0f} s by the clock; loss {ft_loss:.3f} over the last 100 steps |
| {judged}, {dev_examples:,} dev examples | **{served}** through the running service; {in_torch} \
in torch |

## Made by

```bash
python -m training.pretrain CONFIG --data DATA --out build/training/{pretrained} --threads {threads}
python -m training.finetune --encoder build/training/{pretrained}/checkpoint --task {task} --data \
DATA --out {name} \\
    {recipe}
python -m training.evaluate {name} --task {task} --data DATA --url http://127.0.0.1:8000 --model \
{name}
```

`training.json` holds the pretraining's CONFIG and every other setting, the sha256 of every text \
shard and the versions used.

## What it is not

It was made to show that a pretraining decoder costs nothing at inference, not to be the best at \
its task: it saw
{millions:.0f} M tokens where BERT-base saw 43,000 M (a million steps of 256 sequences, nine in ten
of them of 128 tokens, the rest of 512). {learned}It was pretrained once and
fine-tuned once, so a difference between its result and another card's says nothing about their \
recipes. It knows the English of
its task only, inherits whatever bias its text holds, and truncates after {positions} tokens.
{reconstruction}"""

FAMILIES = {"bert": "BERT", "electra": "ELECTRA", "convbert": "ConvBERT"}
TEXTS = {
    "pretrain_wiki": "English Wikipedia before June 2015",
    "pretrain_books": "public-domain books",
}
OBJECTIVES = {"mlm": "masked language modelling", "rtd": "replaced-token detection"}
RECONSTRUCTED = {
    **dict.fromkeys(
        ("plain", "gua", "mix", "drbert"),
        "DrBERT (arXiv 2401.15861) from the paper's abstracts and reviews",
    ),
    "mae": "MAE-LM (arXiv 2302.02060) from its abstract, a review and its published options",
}
RECONSTRUCTION = (
    "\nIts decoder is this project's reconstruction of {};\nits sizes are not the paper's.\n"
)
RECIPE = (
    "epochs",
    "batch_size",
    "learning_rate",
    "warmup_share",
    "weight_decay",
    "dropout",
    "seed",
)


def write_card(directory: Path, name: str) -> None:
    """Renders README.md in `directory` from its config.json, training.json and, once there,
    evaluation.json.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    trained = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    pre, fine = trained["pretraining"], trained["finetuning"]
    told, evaluation = pre["config"], directory / "evaluation.json"
    judged = next(iter(fine["dev_in_torch"]))
    served = "not yet measured"
    if evaluation.is_file():
        measured = json.loads(evaluation.read_text(encoding="utf-8"))
        served = f"{measured[judged]:.4f} ({measured['date']})"
    (directory / "README.md").write_text(
        CARD.format(
            name=name,
            what=_what(told, fine["task"]),
            family=FAMILIES[told["encoder"]["family"]],
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            wide=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            positions=config["max_position_embeddings"],
            decoder=_decoder(told["decoder"]),
            text=_text(told["data"]),
            learned=_learned(pre, told["objective"]["name"]),
            held_out_text=", ".join(told["data"]["held_out"]),
            objective=OBJECTIVES[told["objective"]["name"]],
            steps=pre["steps"],
            tokens=pre["tokens"],
            seconds=pre["seconds"],
            threads=pre["threads"],
            device=pre["device"],
            precision=pre["precision"],
            loss=pre["training_loss_last_100"],
            held_out=pre["held_out_loss"],
            held_out_sequences=pre["held_out_sequences"],
            source=fine["source"],
            examples=fine["examples"],
            epochs=fine["epochs"],
            ft_steps=fine["steps"],
            ft_seconds=fine["seconds"],
            ft_loss=fine["training_loss_last_100"],
            judged=judged,
            dev_examples=fine["dev_examples"],
            in_torch=f"{fine['dev_in_torch'][judged]:.4f}",
            served=served,
            task=fine["task"],
            pretrained=name.removesuffix(f"-{fine['task']}"),
            recipe=" ".join(f"--{key.replace('_', '-')} {fine[key]}" for key in RECIPE),
            millions=pre["tokens"] / 1e6,
            reconstruction=(
                RECONSTRUCTION.format(RECONSTRUCTED[told["decoder"]["design"]])
                if told["decoder"]["design"] in RECONSTRUCTED
                else ""
            ),
        ),
        encoding="utf-8",
    )


def _what(told: dict[str, Any], task: str) -> str:
    family, design = FAMILIES[told["encoder"]["family"]], told["decoder"]["design"]
    if design == "none":
        return f"A small {family}, pretrained without a decoder and fine-tuned on {task}."
    return (
        f"A small {family}, pretrained under the decoder `{design}` and fine-tuned on {task}. "
        "What the decoder added is still in the file; `python -m export` drops it."
    )


def _text(data: dict[str, Any]) -> str:
    known = [
        TEXTS[folder]
        for folder in dict.fromkeys(path.partition("/")[0] for path in data["text"])
        if folder in TEXTS
    ]
    return (", ".join(data["text"]) or data["dataset"]) + (
        f" ({'; '.join(known)})" if known else ""
    )


def _learned(pre: dict[str, Any], objective: str) -> str:
    """How much of the words' neighbours a masked language model learned, by the loss of one who
    learned nothing of them.
    """
    without = pre.get("loss_without_context")  # unknown of encoders from before it was recorded
    if objective != "mlm" or without is None:
        return ""
    return (
        f"A model that ignores\nneighbours has a loss of about {without:.2f} nats; it came to"
        f" {pre['held_out_loss']:.2f}. "
    )


def _decoder(design: dict[str, Any]) -> str:
    match design["design"]:
        case "none":
            return "none"
        case "emd":
            return f"none: `emd` runs the encoder's own last layer {design['layers']} times"
        case name:
            return (
                f"`{name}`: n = {design['layers']} blocks, p = {design['unmasked_first']}, q ="
                f" {design['decoder_share']}; pretraining only"
            )
