"""
Asks each service named on the command line to classify a sentence, and ends with 1 if one answers
wrongly or not at all.

KEYS, where it is set, holds API keys, one a line; # at its beginning or behind white space begins a
comment. Needs the standard library alone.
"""

import json
import math
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request

SENTENCE = "a charming and often affecting journey"
PATIENCE_S = float(os.environ.get("PATIENCE_S", "60"))


def keys() -> list[str]:
    found = (
        re.sub(r"(^|\s)#.*", "", line).strip() for line in os.environ.get("KEYS", "").splitlines()
    )
    return [key for key in found if key]


def classify(url: str) -> dict:
    body = json.dumps({"input": SENTENCE}).encode()
    headers = {"Content-Type": "application/json"}
    for key in keys()[:1]:
        headers["X-API-Key"] = key
    # The certificate names what clients call the service, not the Service of one arm.
    context = ssl._create_unverified_context() if url.startswith("https:") else None
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/v1/classify", body, headers),
                timeout=10,
                context=context,
            ) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            refused = (
                isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
            )
            if refused or time.monotonic() > give_up:
                sys.exit(f"{url}: {error}")
            time.sleep(1)


for url in sys.argv[1:]:
    answer = classify(url)
    [item] = answer["data"]
    if item["label"] not in [score["label"] for score in item["scores"]] or not math.isfinite(
        item["score"]
    ):
        sys.exit(f"{url}: this is no answer: {answer}")
    print(f"{url}: {answer['model']} says {item['label']} {item['score']:.3f}")
