"""
The proof at this size on this GPU: BERT and DrBERT, and a model with its decoder kept that must be
told apart.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.rig import Rig
from benchmarks.harness.findings import Findings, Table, Target
from benchmarks.harness.processes import free_port
from command import Unavailable

PLAN = """
name = "twins-gpu"
claim = "equivalence"
seed = 15862
texts = "{texts}"
restarts = {restarts}

[[arm]]
name = "bert"
role = "reference"
artifact = "{bert}"

[[arm]]
name = "bert-again"
role = "reference"
artifact = "{bert}"

[[arm]]
name = "drbert"
role = "candidate"
artifact = "{drbert}"

[[arm]]
name = "drbert-again"
role = "candidate"
artifact = "{drbert}"

[[arm]]
name = "kept"
role = "control"
artifact = "{kept}"

[[arm]]
name = "bert-delayed"
role = "delayed"

[level.unloaded]
tuples = {tuples}
warm_up_tuples = 8
margins = {{ inference = {{ p50 = 0.01 }} }}

[server]
port = {port}
# One text at a time is asked for: other shapes would be captured at every start for nothing, by
# five models.
settings = {{ max_batch_size = 1 }}
"""
# What is measured until then is sealed and judged.
AT_MOST_S = 420.0
WORDS = {0: "equivalent", 1: "not equivalent", 2: "inconclusive", 3: "invalid"}


def measure(rig: Rig) -> Findings:
    """The judge's verdict on inference time within 1 %; the evidence stays beside the page."""
    texts = rig.folder / "texts.txt"
    texts.write_text("\n".join(rig.texts[:200]) + "\n")
    folders = {name: str(artifact.directory) for name, artifact in rig.artifacts.items()}
    plan = rig.folder / "twins.toml"
    plan.write_text(
        PLAN.format(
            texts=texts,
            bert=folders["bert"],
            drbert=folders["drbert"],
            kept=folders["drbert-with-decoder"],
            port=free_port(),
            restarts=8,
            tuples=32 if rig.rehearsal else 256,
        )
    )
    evidence = rig.evidence or rig.folder / "evidence"
    command = [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(evidence)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = process.communicate(timeout=AT_MOST_S)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            said = process.communicate()[1]
    verdicts = list(evidence.rglob("verdict.json"))
    if process.returncode not in WORDS or not verdicts:
        raise Unavailable(
            f"The proof could not be run: {(said.strip().splitlines() or ['it said nothing'])[-1]}"
        )
    told = json.loads(Path(verdicts[0]).read_text())
    word = WORDS[process.returncode]
    return Findings(
        "twins",
        "Does DrBERT's encoder cost what BERT's does?",
        [
            Table(
                "",
                ("verdict", "within", "what the judge said"),
                [[word, "±1 % of inference p50", told["sentence"]]],
            ),
        ],
        (
            []
            if rig.rehearsal
            else [
                Target(
                    "twins within ±1 % on inference time", "equivalent", word, word == "equivalent"
                )
            ]
        ),
        {"verdict": told},
    )
