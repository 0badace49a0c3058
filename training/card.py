"""
Writes a classifier's model card from the records of its training and evaluation.
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

{summary}

| | |
|---|---|
| encoder | {family}, {layers} layers, {hidden} wide, {heads} heads, feed-forward {wide}, \
{vocabulary:,} WordPieces (uncased), {positions} positions |
| decoder in this file | {decoder} |
| pretraining text | {text} |
| pretraining | {objective}; {steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s by the clock on \
{threads} thread(s) of {device}, {precision} |
| pretraining loss (nats) | {loss:.3f} over the last 100 steps, {held_out:.3f} on \
{held_out_sequences} sequences of {held_out_text}; measured as in training, so with the random mix \
of a decoder that has one |
| fine-tuning | {source}; {examples:,} examples, {epochs} epochs, {ft_steps:,} steps, \
{ft_seconds:,.0f} s by the clock; loss {ft_loss:.3f} over the last 100 steps |
| {metric}, {dev_examples:,} dev examples | **{served}** through the running service; {in_torch} \
in torch |

## Training

```bash
drbert-pretrain CONFIG --data DATA --out build/training/{pretrained} --threads {threads}
drbert-finetune --encoder build/training/{pretrained}/checkpoint --task {task} --data \
DATA --out {name} \\
    {recipe}
drbert-evaluate {name} --task {task} --data DATA --url http://127.0.0.1:8000 --model \
{name}
```

`training.json` holds the pretraining's CONFIG and every other setting, the sha256 of every text \
shard and the versions used.

## Limitations

It was made to show that a pretraining decoder costs nothing at inference, not to be the best at \
its task. It was trained on
{millions:.0f} M tokens; BERT-base was trained on 43,000 M (a million steps of 256 sequences, \
nine in ten
of them of 128 tokens, the rest of 512). {learned}It was pretrained once and
fine-tuned once, so a difference between its result and another card's says nothing about their \
recipes. It is for the English of
its task only, has the biases of its training text, and truncates texts after {positions} tokens.
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
    "retro": "RetroMAE (arXiv 2205.12035), reduced to a share of each text's words",
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
    """Write README.md in `directory` from its config.json, training.json and evaluation.json.

    The last may be missing: then the card says that the classifier is not yet evaluated.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    pretraining, finetuning = training["pretraining"], training["finetuning"]
    run_config, evaluation = pretraining["config"], directory / "evaluation.json"
    design = run_config["decoder"]["design"]
    metric = next(iter(finetuning["dev_in_torch"]))
    served = "not yet measured"
    if evaluation.is_file():
        measured = json.loads(evaluation.read_text(encoding="utf-8"))
        served = f"{measured[metric]:.4f} ({measured['date']})"
    reconstruction = ""
    if design in RECONSTRUCTED:
        reconstruction = RECONSTRUCTION.format(RECONSTRUCTED[design])
    card = CARD.format(
        name=name,
        summary=_summary(run_config, finetuning["task"]),
        family=FAMILIES[run_config["encoder"]["family"]],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        wide=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        decoder=_decoder(run_config["decoder"]),
        text=_text(run_config["data"]),
        learned=_learned(pretraining, run_config["objective"]["name"]),
        held_out_text=", ".join(run_config["data"]["held_out"]),
        objective=OBJECTIVES[run_config["objective"]["name"]],
        steps=pretraining["steps"],
        tokens=pretraining["tokens"],
        seconds=pretraining["seconds"],
        threads=pretraining["threads"],
        device=pretraining["device"],
        precision=pretraining["precision"],
        loss=pretraining["training_loss_last_100"],
        held_out=pretraining["held_out_loss"],
        held_out_sequences=pretraining["held_out_sequences"],
        source=finetuning["source"],
        examples=finetuning["examples"],
        epochs=finetuning["epochs"],
        ft_steps=finetuning["steps"],
        ft_seconds=finetuning["seconds"],
        ft_loss=finetuning["training_loss_last_100"],
        metric=metric,
        dev_examples=finetuning["dev_examples"],
        in_torch=f"{finetuning['dev_in_torch'][metric]:.4f}",
        served=served,
        task=finetuning["task"],
        pretrained=name.removesuffix(f"-{finetuning['task']}"),
        recipe=" ".join(f"--{key.replace('_', '-')} {finetuning[key]}" for key in RECIPE)
        + (" --freeze-encoder" if finetuning.get("freeze_encoder") else ""),
        millions=pretraining["tokens"] / 1e6,
        reconstruction=reconstruction,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def _summary(run_config: dict[str, Any], task: str) -> str:
    family = FAMILIES[run_config["encoder"]["family"]]
    design = run_config["decoder"]["design"]
    if design == "none":
        return f"A small {family}, pretrained without a decoder and fine-tuned on {task}."
    return (
        f"A small {family}, pretrained with the decoder `{design}` and fine-tuned on {task}. The"
        " decoder's weights are still in the file; `drbert-export` drops them."
    )


def _text(data: dict[str, Any]) -> str:
    """Return the training text's shards or dataset, with what the known folders hold."""
    sources = ", ".join(data["text"]) or data["dataset"]
    folders = dict.fromkeys(path.partition("/")[0] for path in data["text"])
    known = [TEXTS[folder] for folder in folders if folder in TEXTS]
    return f"{sources} ({'; '.join(known)})" if known else sources


def _learned(pretraining: dict[str, Any], objective: str) -> str:
    """Return how far a masked language model's loss is from that of a model without context."""
    without = pretraining.get("loss_without_context")  # not recorded by older runs
    if objective != "mlm" or without is None:
        return ""
    # Of a design with a further loss, only that of the masks can be compared.
    parts = pretraining.get("held_out_parts", {})  # not recorded by older runs
    reached = parts.get("masked_loss", pretraining["held_out_loss"])
    return (
        f"A model that ignores\nneighbours has a loss of about {without:.2f} nats; this one reached"
        f" {reached:.2f}. "
    )


def _decoder(design: dict[str, Any]) -> str:
    match design["design"]:
        case "none":
            return "none"
        case "emd":
            return f"none: `emd` runs the encoder's own last layer {design['layers']} times"
        case "retro":
            return (
                f"`retro`: n = {design['layers']} block, which rebuilds {design['rebuilt']:.0%} of"
                f" the words and sees {design['visible']:.0%} of the others; pretraining only"
            )
        case name:
            return (
                f"`{name}`: n = {design['layers']} blocks, p = {design['unmasked_first']}, q ="
                f" {design['decoder_share']}; pretraining only"
            )
