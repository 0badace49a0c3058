"""Serve a cross-encoder with FastAPI over sentence-transformers, as in its documentation."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder

encoder = CrossEncoder(os.environ["CHECKPOINT"], device="cpu")
app = FastAPI()


class Request(BaseModel):
    """A query, and the documents to rank."""

    query: str
    documents: list[str]


@app.get("/readyz")
def readyz() -> str:
    """Answer once the model is loaded."""
    return "ok"


@app.post("/rerank")
def rerank(request: Request) -> Any:
    """Return the documents' scores, best first."""
    ranked = encoder.rank(request.query, request.documents)
    return {
        "results": [
            {"index": each["corpus_id"], "relevance_score": float(each["score"])} for each in ranked
        ]
    }
