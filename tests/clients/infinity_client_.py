"""Tests a service whose /classify uses Infinity's dialect with Infinity's client."""

import importlib.metadata
import sys

from infinity_client import Client
from infinity_client.api.default import classify, health, models
from infinity_client.models import ClassifyInput

url, model = sys.argv[1:]
print(f"infinity_client {importlib.metadata.version('infinity_client')}")
with Client(base_url=url) as client:
    assert health.sync(client=client)["unix"] > 0
    loaded = models.sync(client=client)
    assert [entry.id for entry in loaded.data] == [model], loaded
    answer = classify.sync(
        client=client,
        body=ClassifyInput.from_dict(
            {"input": ["a charming and often affecting journey", "no apparent joy"], "model": model}
        ),
    )
    assert [max(scores, key=lambda score: score.score).label for scores in answer.data] == [
        "POSITIVE",
        "NEGATIVE",
    ], answer
