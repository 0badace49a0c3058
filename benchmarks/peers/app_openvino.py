"""
Serve an artifact with FastAPI over OpenVINO, one request at a time.

It has the same engine and graph as our service, without a batcher.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

ARTIFACT = Path(os.environ["ARTIFACT"])
MANIFEST = json.loads((ARTIFACT / "manifest.json").read_text())
VARIANT = MANIFEST["variants"][os.environ["VARIANT"]]
tokenizer = Tokenizer.from_file(str(ARTIFACT / "tokenizer.json"))
tokenizer.enable_truncation(MANIFEST["max_tokens"])
compiled = ov.Core().compile_model(
    ARTIFACT / VARIANT["files"][0],
    "CPU",
    {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": ov.Type.bf16 if VARIANT["precision"] == "bf16" else ov.Type.f32,
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
    },
)
request_of = threading.local()
app = FastAPI()


class Request(BaseModel):
    """A text to classify."""

    input: str


@app.get("/readyz")
def readyz() -> str:
    """Answer once the model is loaded."""
    return "ok"


@app.post("/classify")
def classify(request: Request) -> Any:
    """Return all labels and their scores, best first."""
    if not hasattr(request_of, "infer"):
        request_of.infer = compiled.create_infer_request()
    encoded = tokenizer.encode(request.input)
    arrays = {
        "input_ids": encoded.ids,
        "attention_mask": encoded.attention_mask,
        "token_type_ids": encoded.type_ids,
    }
    [logits] = request_of.infer.infer(
        {name: np.array([arrays[name]]) for name in MANIFEST["inputs"]}
    ).values()
    exponents = np.exp(logits[0] - logits[0].max())
    scores = [
        {"label": label, "score": float(score)}
        for label, score in zip(MANIFEST["labels"], exponents / exponents.sum(), strict=True)
    ]
    return sorted(scores, key=lambda entry: -entry["score"])
