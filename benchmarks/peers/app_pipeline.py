"""Serve a checkpoint with FastAPI over transformers' pipeline, as in its documentation."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

classifier = pipeline(
    "text-classification",
    model=os.environ["CHECKPOINT"],
    device=os.environ.get("DEVICE", "cpu"),
    dtype=os.environ.get("DTYPE", "float32"),
    top_k=None,
)
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
    return classifier(request.input)
