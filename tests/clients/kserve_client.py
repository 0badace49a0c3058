"""KServe's own REST client against URL, by both of its protocols."""

import asyncio
import importlib.metadata
import sys

from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

url, model = sys.argv[1:]
print(f"kserve {importlib.metadata.version('kserve')}")
TEXTS = ["a charming and often affecting journey", "no apparent joy"]


async def ask() -> None:
    second = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await second.is_server_live(url)
    assert await second.is_server_ready(url)
    assert await second.is_model_ready(url, model)
    answer = await second.infer(
        url, InferRequest(model, [InferInput("text", [2], "BYTES", data=TEXTS)]), model_name=model
    )
    labels = next(output.data for output in answer.outputs if output.name == "label")
    assert labels == ["POSITIVE", "NEGATIVE"], labels
    first = InferenceRESTClient(RESTConfig(protocol="v1"))
    assert await first.is_model_ready(url, model)
    predictions = (await first.infer(url, {"instances": TEXTS}, model_name=model))["predictions"]
    assert [max(one, key=one.get) for one in predictions] == ["POSITIVE", "NEGATIVE"], predictions


asyncio.run(ask())
