"""
Classifies a sentence by each service whose URL is on the command line.

Ends with 1 if a service answers wrongly or not at all. KEYS may hold API keys, one a line; # starts
a comment at the beginning of a line or after white space. Needs the standard library only.
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
    """Return the API keys of the environment."""
    lines = os.environ.get("KEYS", "").splitlines()
    without_comments = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [key for key in without_comments if key]


def classify(url: str) -> dict:
    """Return the answer of a service; it may take PATIENCE_S seconds to become ready."""
    body = json.dumps({"input": SENTENCE}).encode()
    headers = {"Content-Type": "application/json"}
    for key in keys()[:1]:
        headers["X-API-Key"] = key
    request = urllib.request.Request(f"{url}/v1/classify", body, headers)
    # The certificate holds the name that clients use, and not that of one arm's Service.
    context = ssl._create_unverified_context() if url.startswith("https:") else None
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else 500
            is_refused = status < 500 and status != 429
            if is_refused or time.monotonic() > deadline:
                sys.exit(f"{url}: {error}")
            time.sleep(1)


for url in sys.argv[1:]:
    answer = classify(url)
    [item] = answer["data"]
    labels = [score["label"] for score in item["scores"]]
    if item["label"] not in labels or not math.isfinite(item["score"]):
        sys.exit(f"{url}: this is not a classification: {answer}")
    print(f"{url}: {answer['model']} answers {item['label']} {item['score']:.3f}")
