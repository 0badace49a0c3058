"""
Serve a checkpoint with FastAPI over optimum's ORTModel in transformers' pipeline.

PRECISION is fp32 or int8, which is quantised dynamically as in optimum's documentation.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import onnxruntime as ort
from fastapi import FastAPI
from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from pydantic import BaseModel
from transformers import AutoTokenizer, pipeline

options = ort.SessionOptions()
options.intra_op_num_threads = len(os.sched_getaffinity(0))
tokenizer = AutoTokenizer.from_pretrained(os.environ["CHECKPOINT"])
model = ORTModelForSequenceClassification.from_pretrained(
    os.environ["CHECKPOINT"], export=True, session_options=options
)
if os.environ["PRECISION"] == "int8":
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    quantizer = ORTQuantizer.from_pretrained(folder, file_name="model.onnx")
    quantizer.quantize(
        save_dir=folder,
        quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True),
    )
    model = ORTModelForSequenceClassification.from_pretrained(
        folder, file_name="model_quantized.onnx", session_options=options
    )
classifier = pipeline(
    "text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None
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
