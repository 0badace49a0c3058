"""Compares a service's scores with those of sentence-transformers' CrossEncoder."""

import json
import sys
import urllib.request
from typing import Any

import sentence_transformers
from sentence_transformers import CrossEncoder

url, _ = sys.argv[1:]
print(f"sentence-transformers {sentence_transformers.__version__}")
QUERY = "is it a good film?"
DOCUMENTS = [
    "a charming and often affecting journey",
    "no apparent joy",
    "the waiter brought the wrong dish twice",
    "unflinchingly bleak and desperate " * 60,
    "x",
]


def asked(path: str, body: dict[str, Any]) -> Any:
    """Return the answer to a JSON body."""
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


model = CrossEncoder("build/clients/reranker", device="cpu")
expected = model.predict([(QUERY, document) for document in DOCUMENTS]).tolist()
body = {"query": QUERY, "documents": DOCUMENTS, "model": "reranker"}
for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
    results = asked(path, body)["results"]
    for result in results:
        # In bf16 or int8, whichever this processor has.
        assert abs(result["relevance_score"] - expected[result["index"]]) < 0.02, (result, expected)
ranked = [each["corpus_id"] for each in model.rank(QUERY, DOCUMENTS)]
exact = asked("/score", {"queries": QUERY, "documents": DOCUMENTS, "model": "reranker"})["data"]
assert all(abs(each["score"] - expected[each["index"]]) < 0.02 for each in exact), (exact, expected)
served = [each["index"] for each in asked("/v1/rerank", body)["results"]]
by_score = sorted(range(len(expected)), key=lambda index: -expected[index])
assert ranked == by_score, (ranked, by_score)
for first, second in zip(served, ranked, strict=True):
    assert abs(expected[first] - expected[second]) < 0.02, (served, ranked)
