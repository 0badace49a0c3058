"""Tests a service with a client that openapi-python-client generates from its OpenAPI document.

The client has a function for each operation, and a type for errors.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

url, model = sys.argv[1:]
print(f"openapi-python-client {importlib.metadata.version('openapi-python-client')}")
with urllib.request.urlopen(f"{url}/openapi.json") as response:
    document = json.load(response)
with tempfile.TemporaryDirectory() as folder:
    client_package = Path(folder) / "reviews_client"
    generator = [
        str(Path(sys.executable).with_name("openapi-python-client")),
        "generate",
        "--url",
        f"{url}/openapi.json",
        "--meta",
        "none",
    ]
    done = subprocess.run(
        [*generator, "--output-path", str(client_package)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Unable to parse" not in done.stdout + done.stderr, done.stdout
    operations = [
        operation["operationId"]
        for methods in document["paths"].values()
        for operation in methods.values()
    ]
    generated = {path.stem for path in client_package.glob("api/*/*.py")} - {"__init__"}
    assert len(generated) == len(operations), set(operations) ^ generated

    sys.path.insert(0, folder)
    from reviews_client import Client
    from reviews_client.api.classification import classify
    from reviews_client.api.compatibility import predict
    from reviews_client.models import ClassifyRequest, Error, TeiRequest

    client = Client(base_url=url)
    text = "a charming and often affecting journey"
    answer = classify.sync(client=client, body=ClassifyRequest(input_=text, model=model))
    assert answer.data[0].label == "POSITIVE", answer
    refused = classify.sync(client=client, body=ClassifyRequest(input_=text, model="nobody"))
    assert isinstance(refused, Error), refused
    assert refused.error.code == "model_not_found", refused
    scores = predict.sync(client=client, body=TeiRequest(inputs=text))
    assert max(scores, key=lambda entry: entry.score).label == "POSITIVE", scores
