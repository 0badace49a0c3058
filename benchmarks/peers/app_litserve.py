"""Serve a checkpoint with LitServe and its own batching, over transformers."""

from __future__ import annotations

import os
import sys
from typing import Any

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """The classifier of the checkpoint in CHECKPOINT."""

    def setup(self, device: str) -> None:
        """Load the checkpoint."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["CHECKPOINT"])
        self.model = AutoModelForSequenceClassification.from_pretrained(
            os.environ["CHECKPOINT"]
        ).eval()

    # Without annotations, as in LitServe's documentation: it reads them and would look for the
    # parameters in the query.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        """Return the text of a request."""
        return request["input"]

    def batch(self, inputs: list[str]) -> list[str]:
        """Return the texts of a batch as they are."""
        return inputs

    @torch.inference_mode()
    def predict(self, texts: list[str]) -> Any:
        """Return the probabilities, (texts, labels)."""
        encoded = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.model(**encoded).logits.softmax(-1)

    def unbatch(self, output: Any) -> Any:
        """Return the probabilities of each text."""
        return list(output)

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        """Return all labels and their scores, best first."""
        labels = self.model.config.id2label
        return sorted(
            ({"label": labels[i], "score": float(score)} for i, score in enumerate(output)),
            key=lambda entry: -entry["score"],
        )


if __name__ == "__main__":
    api = Classifier(max_batch_size=16, batch_timeout=0.01, api_path="/classify")
    litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, healthcheck_path="/readyz"
    ).run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        generate_client_file=False,
        log_level="warning",
    )
