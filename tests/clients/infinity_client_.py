"""Infinity's own client against URL, whose /classify is Infinity's by setting."""

import importlib.metadata
import sys

from infinity_client import Client
from infinity_client.api.default import classify, health, models
from infinity_client.models import ClassifyInput

url, model = sys.argv[1:]
print(f"infinity_client {importlib.metadata.version('infinity_client')}")
with Client(base_url=url) as client:
    assert health.sync(client=client)["unix"] > 0
    known = models.sync(client=client)
    assert [one.id for one in known.data] == [model], known
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
