"""Tests a service with tritonclient's HTTP client: each compression, as JSON and as bytes."""

import importlib.metadata
import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

url, model = sys.argv[1:]
print(f"tritonclient {importlib.metadata.version('tritonclient')}")
with triton.InferenceServerClient(url.removeprefix("http://")) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert client.get_model_metadata(model)["name"] == model
    for binary in (True, False):
        for algorithm in (None, "gzip", "deflate"):
            texts = triton.InferInput("text", [2], "BYTES")
            texts.set_data_from_numpy(
                np.array(
                    [b"a charming and often affecting journey", b"no apparent joy"], dtype=object
                ),
                binary_data=binary,
            )
            outputs = [
                triton.InferRequestedOutput(name, binary_data=binary)
                for name in ("label", "probabilities")
            ]
            answer = client.infer(
                model,
                [texts],
                outputs=outputs,
                request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )
            assert answer.as_numpy("label").tolist() in (
                [b"POSITIVE", b"NEGATIVE"],
                ["POSITIVE", "NEGATIVE"],
            ), answer.get_response()
            assert answer.as_numpy("probabilities").shape == (2, 2)
    for call in (client.get_model_repository_index, lambda: client.get_model_config(model)):
        try:
            result = f"answered: {call()}"
        except InferenceServerException as error:
            result = str(error)
        assert "Not Found" in result, result
