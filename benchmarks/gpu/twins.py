"""
The proof at this size on this GPU: BERT, DrBERT, and a model whose decoder it must detect.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.gpu_setup import GpuSetup
from benchmarks.harness.findings import Findings, Table, Target
from command import Unavailable
from proof.measuring.launch import free_port

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
# Requests hold one text each. Other shapes would be captured at every start for nothing, by five
# models.
settings = {{ max_batch_size = 1 }}
"""
AT_MOST_S = 420.0
"""Seconds after which the run is stopped; the proof judges the restarts until then."""
VERDICTS = {0: "equivalent", 1: "not equivalent", 2: "inconclusive", 3: "invalid"}


def measure(setup: GpuSetup) -> Findings:
    """Return the judge's verdict on inference time within 1 %; the evidence stays near the page."""
    texts = setup.folder / "texts.txt"
    texts.write_text("\n".join(setup.texts[:200]) + "\n")
    folders = {name: str(artifact.directory) for name, artifact in setup.artifacts.items()}
    plan = setup.folder / "twins.toml"
    plan.write_text(
        PLAN.format(
            texts=texts,
            bert=folders["bert"],
            drbert=folders["drbert"],
            kept=folders["drbert-with-decoder"],
            port=free_port(),
            restarts=8,
            tuples=32 if setup.dry_run else 256,
        )
    )
    evidence = setup.evidence or setup.folder / "evidence"
    command = [sys.executable, "-m", "proof", "run", str(plan), "--evidence", str(evidence)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            errors = process.communicate(timeout=AT_MOST_S)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            errors = process.communicate()[1]
    verdicts = list(evidence.rglob("verdict.json"))
    if process.returncode not in VERDICTS or not verdicts:
        last_line = (errors.strip().splitlines() or ["it printed no error"])[-1]
        raise Unavailable(f"The proof could not be run: {last_line}")
    verdict = json.loads(Path(verdicts[0]).read_text())
    word = VERDICTS[process.returncode]
    columns = ("verdict", "within", "the judge's sentence")
    row = [word, "±1 % of inference p50", verdict["sentence"]]
    targets = []
    if not setup.dry_run:
        holds = word == "equivalent"
        targets.append(Target("twins within ±1 % on inference time", "equivalent", word, holds))
    return Findings(
        "twins",
        "Does DrBERT's encoder cost as much as BERT's?",
        [Table("", columns, [row])],
        targets,
        {"verdict": verdict},
    )
