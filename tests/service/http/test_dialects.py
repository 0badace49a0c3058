"""Every dialect answers a client of its server as that server would.

Real clients send the requests where there are any.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient

from service.artifact import Artifact
from service.http.context import HttpContext
from service.http.routes import build_app
from service.settings import Settings
from service.state import ServiceState
from tests.factories import write_artifact
from tests.service.http.test_routes import client_of
from tests.service.test_server import serving

LIKELY = 1 / (1 + math.exp(-1))  # of one good word against none
BOTH = [
    {"label": "POSITIVE", "score": pytest.approx(LIKELY)},
    {"label": "NEGATIVE", "score": pytest.approx(1 - LIKELY)},
]


async def post(client: httpx.AsyncClient, path: str, body: Any, **headers: str) -> httpx.Response:
    return await client.post(
        path,
        content=body if isinstance(body, bytes) else json.dumps(body).encode(),
        headers=headers,
    )


# Infinity


async def test_a_setting_makes_classify_answer_in_infinitys_format(artifact: Artifact) -> None:
    async with client_of(artifact, classify_dialect="infinity") as (client, _):
        answer = (
            await post(
                client,
                "/classify",
                {"input": ["good", "good bad"], "model": "default/not-specified"},
            )
        ).json()
        raw = (await post(client, "/classify", {"input": ["good"], "raw_scores": True})).json()
        single = await post(client, "/classify", {"input": "good"})
    assert answer["object"] == "classify"
    assert answer["model"] == "reviews"
    assert answer["data"][0] == BOTH
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "total_tokens": 7,
    }  # tokens; Infinity counts characters
    assert answer["id"].startswith("infinity-")
    assert [score["score"] for score in raw["data"][0]] == [
        1.0,
        0.0,
    ]  # logits; an Infinity server ignores the flag
    assert single.status_code == 422
    assert single.json()["error"]["param"] == "input"


@pytest.mark.parametrize("dialect", ["native", "infinity"])
async def test_v1_classify_has_the_services_own_format_under_every_setting(
    artifact: Artifact, dialect: str
) -> None:
    async with client_of(artifact, classify_dialect=dialect) as (client, _):
        answer = (await post(client, "/v1/classify", {"input": "good"})).json()
        described = (await client.get("/openapi.json")).json()["paths"]["/v1/classify"]["post"]
    assert answer["data"][0]["label"] == "POSITIVE"
    assert described["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/ClassifyRequest"
    )


# Large answers


@pytest.mark.parametrize(
    ("path", "field", "settings"),
    [
        ("/classify", "input", {}),
        ("/classify", "input", {"classify_dialect": "infinity"}),
        ("/predict", "inputs", {}),
        ("/", "inputs", {}),
        ("/v1/models/reviews:predict", "instances", {}),
    ],
)
async def test_a_large_answer_is_the_same_as_many_small_ones(
    tmp_path: Path, path: str, field: str, settings: dict[str, Any]
) -> None:
    many = write_artifact(
        tmp_path / "many",
        name="reviews",
        labels=[f"a label of some length, number {i}" for i in range(150)],
    )
    texts = ["good", "bad", "film"] * 10
    sent: list[Any] = [[text] for text in texts] if path == "/predict" else texts
    async with client_of(many, **settings) as (client, _):
        whole = await post(client, path, {field: sent})
        single = [await post(client, path, {field: [item]}) for item in sent]
    assert (
        len(whole.content) == int(whole.headers["content-length"]) > 131_072
    )  # in more than one piece
    key = {"/classify": "data", "/v1/models/reviews:predict": "predictions"}.get(path)
    items, alone = whole.json(), [response.json() for response in single]
    if key is not None:
        items, alone = items[key], [answer[key] for answer in alone]
    for number, (item, [other]) in enumerate(zip(items, alone, strict=True)):
        assert item == (
            other | {"index": number} if isinstance(other, dict) and "index" in other else other
        )


# Text Embeddings Inference


@pytest.mark.parametrize(
    ("inputs", "answer"),
    [
        ("good", BOTH),
        (["good"], BOTH),
        (["film", "good"], BOTH),
        ([["good"]], [BOTH]),
        ([["good"], ["film", "good"]], [BOTH, BOTH]),
    ],
)
async def test_a_flat_list_in_tei_is_one_text_or_pair_and_a_nested_one_is_a_batch(
    artifact: Artifact, inputs: Any, answer: Any
) -> None:
    async with client_of(artifact) as (client, _):
        response = await post(client, "/predict", {"inputs": inputs})
    assert response.json() == answer
    assert response.headers["x-compute-tokens"].isdigit()
    assert response.headers["x-inference-time"].isdigit()
    assert response.headers["x-compute-type"] == "cpu"


async def test_tei_truncates_on_the_named_side_and_refuses_in_its_own_format(
    artifact: Artifact,
) -> None:
    long = "good " * 20 + "bad " * 20
    async with client_of(artifact) as (client, _):
        first_cut = (
            await post(client, "/predict", {"inputs": long, "truncation_direction": "Left"})
        ).json()
        refused = await post(client, "/predict", {"inputs": [["good"], [long]], "truncate": False})
        wrong = await post(client, "/predict", {"inputs": [["a", "b", "c"]]})
        raw = (await post(client, "/predict", {"inputs": "good good", "raw_scores": True})).json()
        directions: list[Any] = ["Up", [], {}, 1]
        nonsense = [
            await post(client, "/predict", {"inputs": "good", "truncation_direction": direction})
            for direction in directions
        ]
    assert first_cut[0]["label"] == "NEGATIVE"
    assert [response.status_code for response in nonsense] == [422] * 4
    assert refused.status_code == 422
    assert refused.json()["error_type"] == "Validation"
    assert refused.json()["error"].startswith("inputs[1]: It has 42 tokens")
    assert wrong.json() == {
        "error": "inputs[0] must be a text, or a list of one text, or of the two texts of a pair.",
        "error_type": "Validation",
    }
    assert [score["score"] for score in raw] == [2.0, 0.0]


async def test_tei_applies_the_sigmoid_to_a_multi_label_model(tmp_path: Path) -> None:
    several = write_artifact(tmp_path / "several", labels=("angry", "glad"), task="multi_label")
    async with client_of(several) as (client, _):
        answer = (await post(client, "/predict", {"inputs": "good bad"})).json()
    assert [score["score"] for score in answer] == pytest.approx([LIKELY, LIKELY])


async def test_tei_reports_a_failed_model_as_a_backend_error(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        response = await post(client, "/predict", {"inputs": "poison"})
    assert response.status_code == 424
    assert response.json()["error_type"] == "Backend"


# Hugging Face


def test_hugging_faces_client_gets_its_labels(artifact: Artifact) -> None:
    with serving(artifact) as (url, _):
        for address in (url, f"{url}/models/reviews"):
            result = InferenceClient(model=address, token="none").text_classification(
                "good", top_k=1
            )
            assert [label_score.label for label_score in result] == ["POSITIVE"]
            assert result[0].score == pytest.approx(LIKELY)
        raw = InferenceClient(model=url, token="none").text_classification(
            "good good", function_to_apply="none"
        )
        assert [label_score.score for label_score in raw] == [2.0, 0.0]


async def test_hugging_faces_errors_name_the_field(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        missing = await post(client, "/", {"parameters": {}})
        unknown = await post(client, "/", {"inputs": "good", "parameters": {"temperature": 1}})
        nobody = await post(client, "/models/nobody", {"inputs": "good"})
        empty = await post(client, "/", {"inputs": ["good", ""]})
    assert missing.json() == {"error": "inputs is missing."}
    assert unknown.json()["error"].startswith("parameters.temperature is not a field")
    assert nobody.status_code == 404
    assert empty.json()["error"].startswith("inputs[1] is empty")


@pytest.mark.parametrize(
    ("truncation", "status"),
    [
        (None, 200),
        (True, 200),
        ("longest_first", 200),
        (False, 422),
        ("do_not_truncate", 422),
        ("only_second", 422),
        (1, 422),
        ([], 422),
    ],
)
async def test_hugging_faces_truncation_is_applied_or_refused(
    artifact: Artifact, truncation: Any, status: int
) -> None:
    async with client_of(artifact) as (client, _):
        response = await post(
            client, "/", {"inputs": "good " * 20, "parameters": {"truncation": truncation}}
        )
        short = await post(
            client, "/", {"inputs": "good", "parameters": {"truncation": "do_not_truncate"}}
        )
    assert response.status_code == status
    assert short.status_code == 200


async def test_hugging_faces_options_without_effect_are_accepted_and_others_refused(
    artifact: Artifact,
) -> None:
    async with client_of(artifact) as (client, _):
        known = await post(
            client, "/", {"inputs": "good", "options": {"use_cache": False, "wait_for_model": True}}
        )
        unknown = await post(client, "/", {"inputs": "good", "options": {"use_gpu": True}})
        none = await post(client, "/", {"inputs": "good", "options": "all"})
    assert known.status_code == 200
    assert (unknown.status_code, none.status_code) == (422, 422)
    assert unknown.json()["error"].startswith("options.use_gpu is not a field")
    assert none.json()["error"] == "options must be an object."


# KServe V1


async def test_kserves_predictions_are_scores_by_label(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        answer = (
            await post(client, "/v1/models/reviews:predict", {"instances": ["good", "film"]})
        ).json()
        ready = (await client.get("/v1/models/reviews")).json()
        listed = (await client.get("/v1/models")).json()
        nobody = await post(client, "/v1/models/nobody:predict", {"instances": ["good"]})
        single = await post(client, "/v1/models/reviews:predict", {"instances": "good"})
    assert answer == {
        "predictions": [
            {"NEGATIVE": pytest.approx(1 - LIKELY), "POSITIVE": pytest.approx(LIKELY)},
            {"NEGATIVE": 0.5, "POSITIVE": 0.5},
        ]
    }
    assert ready == {"name": "reviews", "ready": True}
    assert listed["models"] == ["reviews"]
    assert nobody.status_code == 404
    assert "error" in nobody.json()
    assert single.json() == {"error": "instances must be a list of texts."}


# Open Inference Protocol


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_sends_and_receives_tensors(artifact: Artifact, binary: bool) -> None:
    with serving(artifact) as (url, _):
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("reviews")
        assert client.get_server_metadata()["name"] == "drbert-serve"
        assert client.get_model_metadata("reviews")["outputs"][2] == {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": [-1, 2],
        }
        texts = triton.InferInput("text", [2], "BYTES")
        texts.set_data_from_numpy(
            np.array([b"good", "b\u00e9b\u00e9".encode()], dtype=object), binary_data=binary
        )
        requested_outputs = [
            triton.InferRequestedOutput(name, binary_data=binary)
            for name in ("label", "probabilities")
        ]
        answer = client.infer("reviews", [texts], outputs=requested_outputs, request_id="42")
        assert [
            label.decode() if isinstance(label, bytes) else label
            for label in answer.as_numpy("label")
        ] == ["POSITIVE", "NEGATIVE"]
        assert answer.as_numpy("probabilities") == pytest.approx(
            np.array([[1 - LIKELY, LIKELY], [0.5, 0.5]]), abs=1e-6
        )
        assert answer.get_response()["id"] == "42"
        best = client.infer(
            "reviews",
            [texts],
            outputs=[triton.InferRequestedOutput("score", binary_data=binary, class_count=1)],
        )
        first = best.as_numpy("score")[0]
        first = first[0] if isinstance(first, np.ndarray) else first
        assert (first.decode() if isinstance(first, bytes) else first).endswith(":1:POSITIVE")
        with pytest.raises(triton.InferenceServerException, match="No model has that name"):
            client.infer("nobody", [texts])


async def test_every_model_has_only_version_1(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        versions = {
            version: [
                await client.get(f"/v2/models/reviews/versions/{version}"),
                await client.get(f"/v2/models/reviews/versions/{version}/ready"),
                await post(client, f"/v2/models/reviews/versions/{version}/infer", tensor()),
            ]
            for version in ("1", "99")
        }
        plain = await client.get("/v2/models/reviews")
        nobody = await client.get("/v2/models/nobody/versions/1")
        described = (await client.get("/openapi.json")).json()["paths"]
    assert [answer.status_code for answer in versions["1"]] == [200] * 3
    assert versions["1"][0].json() == plain.json()
    assert [answer.status_code for answer in versions["99"]] == [404] * 3
    assert {answer.json()["error"] for answer in versions["99"]} == {
        "There is no version 99; every model has only version 1."
    }
    assert nobody.status_code == 404
    assert {
        f"/v2/models/{{model}}/versions/{{version}}{action}" for action in ("", "/ready", "/infer")
    } <= described.keys()


async def test_two_tensors_make_pairs(artifact: Artifact) -> None:
    tensors = [
        {"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [word]}
        for name, word in (("text", "film"), ("text_pair", "good"))
    ]
    async with client_of(artifact) as (client, _):
        answer = (
            await post(client, "/v2/models/reviews/versions/1/infer", {"inputs": tensors})
        ).json()
    assert [output["name"] for output in answer["outputs"]] == ["label", "score", "probabilities"]
    assert answer["outputs"][0]["data"] == ["POSITIVE"]


def tensor(**changes: Any) -> dict[str, Any]:
    return {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"], **changes}]
    }


WRONG: dict[str, tuple[Any, str]] = {
    "no inputs": ({}, "inputs must be a list of tensors"),
    "another type": (tensor(datatype="FP32"), "text must be of datatype BYTES"),
    "a matrix": (tensor(shape=[1, 2]), r"text must have the shape \[N\] or \[N, 1\]"),
    "fewer texts": (tensor(shape=[2]), "text must hold 2 texts"),
    "no text": (tensor(data=[3]), "text must hold 1 texts"),
    "an unknown output": (
        tensor() | {"outputs": [{"name": "colour"}]},
        "outputs: known are label, score, probabilities",
    ),
    "a foreign size": (
        tensor(parameters={"binary_data_size": 9}),
        "binary_data_size is not within the body",
    ),
    "an empty text": (tensor(data=[""]), r"text\[0\] is empty"),
    "names that are no names": (
        {"inputs": [{"name": 8.8}, {"name": {}, "datatype": "BYTES"}]},
        "inputs must be the tensor text, and text_pair for pairs",
    ),
    "a list for a name": (
        {"inputs": [{"name": ["text"]}, {"name": "text"}]},
        "inputs must be the tensor text",
    ),
    "a name that is no name": (tensor(name={}, datatype="FP32"), "text must be of datatype BYTES"),
    "true for a shape": (tensor(shape=[True]), r"text must have the shape"),
    "true for a tensor's parameters": (
        tensor(parameters=True),
        "text: parameters must be an object",
    ),
    "true for a size": (
        tensor(parameters={"binary_data_size": True}),
        "binary_data_size is not within the body",
    ),
    "text for all parameters": (
        tensor() | {"parameters": "binary"},
        "parameters must be an object",
    ),
    "a list for an output's parameters": (
        tensor() | {"outputs": [{"name": "label", "parameters": [1]}]},
        "outputs: parameters must be an object",
    ),
    "a list for an output's name": (
        tensor() | {"outputs": [{"name": ["label"]}]},
        "outputs: known are label",
    ),
    "a share for outputs": (tensor() | {"outputs": 0.3}, "outputs must be a list of objects"),
    "text for a class count": (
        tensor() | {"outputs": [{"name": "label", "parameters": {"classification": True}}]},
        "classification must be a number",
    ),
    "a tensor's unknown field": (
        tensor(colour="red"),
        "text.colour is not a field of this request",
    ),
    "an output's unknown field": (
        tensor() | {"outputs": [{"name": "label", "datatype": "BYTES"}]},
        "outputs.datatype is not a field of this request",
    ),
    "shared memory": (
        tensor() | {"outputs": [{"name": "label", "parameters": {"shared_memory_region": "a"}}]},
        "outputs: shared memory is not supported",
    ),
    "an output named twice": (
        tensor() | {"outputs": [{"name": "label"}] * 2},
        "outputs: label is named twice",
    ),
    "a number for an id": (tensor() | {"id": 7}, "id must be a text"),
    "no JSON": (b"{", "The body is not UTF-8 JSON"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_tensor_that_cannot_be_used_is_refused_with_400(
    artifact: Artifact, case: str
) -> None:
    body, message = WRONG[case]
    async with client_of(artifact) as (client, _):
        response = await post(client, "/v2/models/reviews/infer", body)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert re.search(message, response.json()["error"])


@pytest.mark.parametrize(
    "tail", [b"\x09", struct.pack("<I", 9) + b"good", struct.pack("<I", 2) + b"\xff\xfe"]
)
async def test_a_binary_tensor_that_holds_no_texts_is_refused(
    artifact: Artifact, tail: bytes
) -> None:
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "text",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(tail)},
                }
            ]
        }
    ).encode()
    async with client_of(artifact) as (client, _):
        response = await post(
            client,
            "/v2/models/reviews/infer",
            head + tail,
            **{"Inference-Header-Content-Length": str(len(head))},
        )
        beyond = [
            await post(
                client,
                "/v2/models/reviews/infer",
                head,
                **{"Inference-Header-Content-Length": length},
            )
            for length in ("99999", "9" * 5000)
        ]
    assert response.status_code == 400
    assert response.json()["error"].startswith("text")
    assert [refused.status_code for refused in beyond] == [400, 400]


async def test_all_dialects_return_the_same_score_for_a_text(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        native = (await post(client, "/classify", {"input": "good good bad"})).json()["data"][0][
            "probs"
        ][1]
        tei = (await post(client, "/predict", {"inputs": "good good bad"})).json()[0]["score"]
        face = (await post(client, "/", {"inputs": "good good bad"})).json()[0][0]["score"]
        kserve = (
            await post(client, "/v1/models/reviews:predict", {"instances": ["good good bad"]})
        ).json()["predictions"][0]["POSITIVE"]
        [probabilities] = [
            o
            for o in (
                await post(client, "/v2/models/reviews/infer", tensor(data=["good good bad"]))
            ).json()["outputs"]
            if o["name"] == "probabilities"
        ]
    assert native == tei == face == kserve == probabilities["data"][1]


@pytest.mark.parametrize("labels", [1, 2])
async def test_every_dialect_returns_logits_on_request(tmp_path: Path, labels: int) -> None:
    artifact = write_artifact(
        tmp_path / "reviews",
        labels=["POSITIVE", "NEGATIVE"][:labels],
        activation="sigmoid" if labels == 1 else None,
    )
    async with (
        client_of(artifact) as (client, _),
        client_of(artifact, classify_dialect="infinity") as (infinity, _),
    ):
        native = (await post(client, "/classify", {"input": "good", "activation": "none"})).json()[
            "data"
        ][0]["scores"]
        others = [
            (await post(infinity, "/classify", {"input": ["good"], "raw_scores": True})).json()[
                "data"
            ][0],
            (await post(client, "/predict", {"inputs": "good", "raw_scores": True})).json(),
            (
                await post(
                    client, "/", {"inputs": "good", "parameters": {"function_to_apply": "none"}}
                )
            ).json()[0],
        ]
        kserve = (
            await post(
                client,
                "/v1/models/reviews:predict",
                {"instances": ["good"], "parameters": {"activation": "none"}},
            )
        ).json()["predictions"][0]
        tensor_request = {
            "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"]}],
            "parameters": {"activation": "none"},
        }
        triton = (await post(client, "/v2/models/reviews/infer", tensor_request)).json()["outputs"]
        scored = (await post(client, "/classify", {"input": "good"})).json()["data"][0]
    assert all(other == native for other in others)
    assert kserve == {label_score["label"]: label_score["score"] for label_score in native}
    assert next(output["data"] for output in triton if output["name"] == "score") == [
        native[0]["score"]
    ]
    expected_scores = [1 / (1 + math.exp(-native[0]["score"]))] if labels == 1 else [LIKELY]
    assert scored["score"] == pytest.approx(expected_scores[0])


async def test_an_unknown_parameter_of_kserve_is_refused_by_name(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        unknown = await post(
            client,
            "/v1/models/reviews:predict",
            {"instances": ["good"], "parameters": {"top_k": 1}},
        )
        wrong = await post(
            client,
            "/v1/models/reviews:predict",
            {"instances": ["good"], "parameters": {"activation": "relu"}},
        )
    assert unknown.status_code == wrong.status_code == 422
    assert unknown.json()["error"].startswith("parameters.top_k is not a field")


# Fields of newer clients


async def test_kserves_client_names_the_model_in_the_body_too(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        same = await post(
            client,
            "/v2/models/reviews/infer",
            tensor() | {"model_name": "reviews", "model_version": None},
        )
        other = await post(client, "/v2/models/reviews/infer", tensor() | {"model_name": "others"})
        health = [(await client.get(f"/v2/health/{check}")).json() for check in ("live", "ready")]
    assert same.status_code == 200
    assert (other.status_code, other.json()["error"]) == (
        400,
        "model_name is 'others', and the path names reviews.",
    )
    assert health == [{"live": True}, {"ready": True}]


async def test_a_draining_server_is_not_ready_in_kserves_format(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, service):
        service.lifecycle.start_draining()
        answer = await client.get("/v2/health/ready")
    assert answer.status_code == 503
    assert answer.json()["ready"] is False


async def test_infinitys_client_gets_health_and_models(artifact: Artifact) -> None:
    async with client_of(artifact, classify_dialect="infinity") as (client, _):
        health, models = (await client.get("/health")).json(), (await client.get("/models")).json()
    assert health["unix"] > 1_700_000_000
    assert [
        (model["id"], model["capabilities"], model["stats"]["queue_absolute"])
        for model in models["data"]
    ] == [("reviews", ["classify"], 0)]


@pytest.mark.parametrize(("data", "status"), [("Z29vZA==", 200), ("good!", 400), ("/w==", 400)])
async def test_a_tensor_in_base64_is_decoded_or_refused(
    artifact: Artifact, data: str, status: int
) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(
            client,
            "/v2/models/reviews/infer",
            tensor(data=[data], parameters={"content_type": "base64"}),
        )
        unknown = await post(
            client, "/v2/models/reviews/infer", tensor(parameters={"content_type": "np"})
        )
    assert answer.status_code == status
    if status == 200:
        assert next(
            output["data"] for output in answer.json()["outputs"] if output["name"] == "label"
        ) == ["POSITIVE"]
    assert (unknown.status_code, unknown.json()["error"]) == (
        400,
        "text: content_type is 'np'; it must be str or base64.",
    )


async def test_an_unknown_path_of_a_protocol_is_refused_in_its_format(
    artifact: Artifact, tmp_path: Path
) -> None:
    async with client_of(artifact) as (client, _):
        refusals = [
            await client.get("/v2/models/reviews/config"),
            await client.post("/v2/repository/index"),
            await client.put("/v2/models/reviews/infer"),
            await client.get("/v1/models/a/b"),
        ]
        ours = await client.get("/nothing")
    assert all(isinstance(refused.json()["error"], str) for refused in refusals)
    assert ours.json()["error"]["code"] == "not_found"


async def test_a_setting_makes_the_root_answer_in_teis_format(artifact: Artifact) -> None:
    async with client_of(artifact, root_dialect="tei") as (client, _):
        pair = (await post(client, "/", {"inputs": ["good", "bad"]})).json()
        described = (await client.get("/openapi.json")).json()["paths"]["/"]["post"]
    assert {label_score["label"] for label_score in pair} == {
        "NEGATIVE",
        "POSITIVE",
    }  # one pair; for Hugging Face it would be two texts
    assert described["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/TeiRequest"
    )


async def test_a_models_name_may_hold_slashes(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "reviews")
    service = ServiceState({"org/reviews": artifact}, Settings(warm_up_s=0))
    service.lifecycle.load()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app(HttpContext(service))), base_url="http://test"
    ) as client:
        answers = [
            await post(client, "/models/org/reviews", {"inputs": "good"}),
            await post(client, "/v1/models/org/reviews:predict", {"instances": ["good"]}),
            await post(client, "/v2/models/org/reviews/infer", tensor()),
            await post(client, "/v2/models/org%2Freviews/versions/1/infer", tensor()),
            *[
                await client.get(path)
                for path in (
                    "/v1/models/org/reviews",
                    "/v2/models/org/reviews",
                    "/v2/models/org/reviews/ready",
                    "/v2/models/org/reviews/versions/1",
                    "/v2/models/org/reviews/versions/1/ready",
                )
            ],
        ]
        unknown = await client.get("/v2/models/org/others/ready")
        wrong = [
            await client.get("/v2/models/reviews/infer"),
            await client.get("/v2/models/"),
            await client.post("/v2/models/reviews/infer/"),
            await post(client, "/models/a%0Ab", {"inputs": "good"}),
        ]
    await service.lifecycle.drain()
    assert [answer.status_code for answer in answers] == [200] * 9
    assert unknown.status_code == 404
    assert [answer.status_code for answer in wrong] == [405, 404, 404, 404]


async def test_fields_of_vllms_clients_are_applied_or_ignored(artifact: Artifact) -> None:
    long = "bad " + "good " * 20
    async with client_of(artifact) as (client, _):
        harmless = await post(
            client,
            "/classify",
            {
                "input": "good",
                "padding": None,
                "mm_processor_kwargs": None,
                "cache_salt": "x",
                "priority": 0,
            },
        )
        left, right = [
            (await post(client, "/classify", {"input": long, "truncation_side": side})).json()[
                "data"
            ][0]["score"]
            for side in ("left", "right")
        ]
        both = await post(
            client, "/classify", {"input": long, "truncation_side": "left", "truncate": "right"}
        )
    assert harmless.status_code == 200
    assert left > right
    assert (both.status_code, both.json()["error"]["param"]) == (422, "truncation_side")


async def test_probs_can_be_left_out(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        [answer] = (
            await post(client, "/classify", {"input": "good", "top_k": 1, "probs": False})
        ).json()["data"]
    assert "probs" not in answer
    assert len(answer["scores"]) == 1


@pytest.mark.parametrize(("every", "labels"), [(True, 2), (False, 1), (None, 2)])
async def test_older_parameters_of_hugging_face_are_accepted(
    artifact: Artifact, every: bool | None, labels: int
) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(
            client,
            "/",
            {"inputs": "good", "parameters": {"return_all_scores": every, "padding": True}},
        )
    assert len(answer.json()[0]) == labels


async def test_the_description_lists_the_errors_of_each_path(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        paths = (await client.get("/openapi.json")).json()["paths"]
        failed = [
            (await post(client, path, body)).status_code
            for path, body in (
                ("/predict", {"inputs": "poison"}),
                ("/classify", {"input": "poison"}),
            )
        ]
    assert failed == [424, 500]
    assert "424" in paths["/predict"]["post"]["responses"]
    assert "424" not in paths["/classify"]["post"]["responses"]
    assert "500" not in paths["/predict"]["post"]["responses"]
    assert "422" not in paths["/v2/models/{model}/infer"]["post"]["responses"]
    assert all(
        "500" in paths[path]["post"]["responses"]
        for path in ("/classify", "/v2/models/{model}/infer")
    )


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/classify", {"truncate_prompt_tokens": 4}),
        ("/classify", {"truncate_prompt_tokens": 4, "truncation_side": "right"}),
        ("/", {"parameters": {"max_length": 4}}),
        ("/", {"parameters": {"max_length": 4, "truncation": "longest_first"}}),
    ],
)
async def test_a_request_may_truncate_texts_below_the_models_limit(
    artifact: Artifact, path: str, fields: dict[str, Any]
) -> None:
    field = "input" if path == "/classify" else "inputs"
    async with client_of(artifact) as (client, _):
        cut, whole = [
            (await post(client, path, {field: text, **fields})).json()
            for text in ("good good bad bad", "good good")
        ]
        expected = (await post(client, "/classify", {"input": "good good"})).json()["data"][0][
            "scores"
        ]
    for answer in (cut, whole):
        assert (answer["data"][0]["scores"] if path == "/classify" else answer[0]) == expected
    if path == "/classify":
        assert [
            (answer["data"][0]["tokens"], answer["data"][0]["truncated"]) for answer in (cut, whole)
        ] == [(4, True), (4, False)]


async def test_a_token_limit_above_the_models_or_without_truncation_changes_nothing(
    artifact: Artifact,
) -> None:
    text = "good " * 100
    async with client_of(artifact) as (client, _):
        answers = [
            (await post(client, "/classify", {"input": text} | fields)).json()["data"]
            for fields in ({}, {"truncate_prompt_tokens": 10_000}, {"truncate_prompt_tokens": -1})
        ]
        uncut = await post(
            client, "/", {"inputs": text, "parameters": {"max_length": 4, "truncation": False}}
        )
    assert answers[0] == answers[1] == answers[2]
    assert uncut.status_code == 422


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0, which leaves no token"),
        (
            {"truncate_prompt_tokens": -2},
            "truncate_prompt_tokens: Input should be greater than or equal to -1.",
        ),
        (
            {"truncate_prompt_tokens": 2},
            "truncate_prompt_tokens is 2, and a text has 2 special tokens; give at least 3.",
        ),
        (
            {"truncate_prompt_tokens": 4, "window": {}},
            "truncate_prompt_tokens and window do not go together",
        ),
        (
            {"truncate_prompt_tokens": 4, "truncate": "none"},
            "truncate_prompt_tokens and truncate none do not go together",
        ),
    ],
)
async def test_an_impossible_token_limit_is_refused(
    artifact: Artifact, fields: dict[str, Any], message: str
) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(client, "/classify", {"input": "good"} | fields)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("most", [0, True, "12", 1.5])
async def test_a_max_length_that_is_not_a_number_of_tokens_is_refused(
    artifact: Artifact, most: object
) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(client, "/", {"inputs": "good", "parameters": {"max_length": most}})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("parameters.max_length must be a number of tokens")


@pytest.mark.parametrize(
    ("parameters", "status"),
    [({}, 200), (None, 200), ({"top_k": None}, 200), ({"top_k": 1}, 422), ([], 422)],
)
async def test_tei_ignores_empty_parameters_of_hugging_faces_client(
    artifact: Artifact, parameters: object, status: int
) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(client, "/predict", {"inputs": "good", "parameters": parameters})
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["error"].startswith("parameters is not a field of this request")


async def test_an_impossible_max_length_is_refused_by_that_name(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(client, "/", {"inputs": ["good"], "parameters": {"max_length": 2}})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(
        "parameters.max_length is 2, and a text has 2 special tokens"
    )


async def test_a_path_with_a_newline_is_404(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        answer = await post(client, "/classify%0A", {"input": "good"})
    assert answer.status_code == 404
