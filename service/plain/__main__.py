"""
Answers texts without a server: one at a time, unpacked, by the engine that the server would choose.

    python -m service.plain ARTIFACT [--variant NAME] < texts.json > answers.json

The input is a JSON list of texts. The output is one JSON object: `variant`, `labels`, and `scores`,
a list for each text in the order of the labels. `drbert-prove` compares a server's answers with
these. The self-check compares them with the exporting host's, which were verified against torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Before tokenizers is imported: its own threads would compete with the engine's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from command import BadInput, Parser, finish
from service import self_check
from service.answers import activate, default_activation
from service.artifact import read_artifact
from service.classifier import Classifier
from service.loading.engine import LoadOptions, load_engine
from service.runtimes.auto import load
from service.settings import read_settings


def main(arguments: Sequence[str]) -> int:
    """Answer the texts of standard input on standard output; return the exit code."""
    parser = Parser(prog="python -m service.plain", description="Answer texts without a server.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--variant", default="auto", help="a variant of the artifact, or auto")
    options = parser.parse_args(arguments)
    try:
        texts = json.load(sys.stdin)
    except ValueError as error:
        raise BadInput(f"Standard input is no JSON list of texts: {error}.") from None
    variant, classifier = load_plain(options.artifact, options.variant)
    main_head = classifier.manifest.parts[0]
    activation = default_activation(main_head.manifest)
    scores = []
    for text in texts:
        logits = classifier.predict([classifier.encode(text)])[0]
        scores.append(activate(logits[main_head.columns].tolist(), activation))
    labels = main_head.manifest.labels
    print(json.dumps({"variant": variant, "labels": labels, "scores": scores}))
    return 0


def load_plain(folder: Path, variant: str = "auto") -> tuple[str, Classifier]:
    """Return a variant's name, by default that of the server's choice, and it, loaded unpacked."""
    artifact = read_artifact(folder)
    if artifact.manifest.labels_tokens:
        raise BadInput(f"{folder} labels tokens; a proof compares models that classify texts.")
    options = LoadOptions.from_settings(read_settings("127.0.0.1"), variant)
    options = replace(options, warm_up_s=0.0)
    engine = load_engine(folder.name, artifact, options, lambda: False)
    if engine.classifier.packing is None:
        return engine.choice.variant, engine.classifier
    runtime = load(artifact, engine.choice, options.threads, options.gpu, packs=False)
    classifier = Classifier(artifact, runtime, options.max_batch_size, options.max_batch_tokens)
    self_check.check(classifier, engine.choice.variant)
    return engine.choice.variant, classifier


if __name__ == "__main__":
    finish(main)
