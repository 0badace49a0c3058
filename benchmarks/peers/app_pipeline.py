"""FastAPI over transformers' pipeline, as its documentation shows it."""

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
    input: str


@app.get("/readyz")
def readyz() -> str:
    return "ok"


@app.post("/classify")
def classify(request: Request) -> Any:
    return classifier(request.input)
