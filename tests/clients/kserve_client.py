"""Tests a service with KServe's REST client, by both of its protocols."""

import asyncio
import importlib.metadata
import sys

from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

url, model = sys.argv[1:]
print(f"kserve {importlib.metadata.version('kserve')}")
TEXTS = ["a charming and often affecting journey", "no apparent joy"]


async def check_answers() -> None:
    v2 = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await v2.is_server_live(url)
    assert await v2.is_server_ready(url)
    assert await v2.is_model_ready(url, model)
    answer = await v2.infer(
        url, InferRequest(model, [InferInput("text", [2], "BYTES", data=TEXTS)]), model_name=model
    )
    labels = next(output.data for output in answer.outputs if output.name == "label")
    assert labels == ["POSITIVE", "NEGATIVE"], labels
    v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
    assert await v1.is_model_ready(url, model)
    predictions = (await v1.infer(url, {"instances": TEXTS}, model_name=model))["predictions"]
    labels = [max(scores, key=scores.get) for scores in predictions]
    assert labels == ["POSITIVE", "NEGATIVE"], predictions


asyncio.run(check_answers())
