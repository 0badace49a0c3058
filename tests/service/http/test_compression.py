"""Compressed bodies are decompressed within the limits, and unsupported codings are refused."""

from __future__ import annotations

import gzip
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton

from service.artifact import Artifact
from service.errors import InvalidRequest, TooLarge, UnsupportedEncoding
from service.http.transport.compression import decompressed
from tests.service.http.test_routes import client_and_context
from tests.service.test_server import serving

BODY = json.dumps({"input": "good"}).encode()


def bare(data: bytes) -> bytes:
    """Return raw deflate data without zlib's frame, as many clients send it."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:5]) + gzip.compress(BODY[5:])),
        ("deflate", zlib.compress(BODY)),
        ("deflate", bare(BODY)),
        ("identity", BODY),
    ],
)
async def test_a_compressed_body_is_read(artifact: Artifact, coding: str, body: bytes) -> None:
    async with client_and_context(artifact) as (client, context):
        answer = await client.post("/classify", content=body, headers={"Content-Encoding": coding})
        assert context.body_budget._used == 0
    assert answer.json()["data"][0]["label"] == "POSITIVE"


@pytest.mark.parametrize(
    ("coding", "body", "status", "code"),
    [
        ("br", BODY, 415, "unsupported_encoding"),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY)), 415, "unsupported_encoding"),
        ("gzip", BODY, 400, "invalid_request"),
        ("gzip", gzip.compress(BODY)[:-4], 400, "invalid_request"),
        ("deflate", b"", 400, "invalid_request"),
        ("gzip", gzip.compress(BODY) + b"more", 400, "invalid_request"),
        ("gzip", gzip.compress(b" " * 5_000_000), 413, "too_large"),
    ],
)
async def test_a_body_that_is_not_compressed_as_declared_or_too_large_is_refused(
    artifact: Artifact, coding: str, body: bytes, status: int, code: str
) -> None:
    async with client_and_context(artifact) as (client, context):
        answer = await client.post("/classify", content=body, headers={"Content-Encoding": coding})
        assert context.body_budget._used == 0
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_decompression_stops_at_the_limit() -> None:
    assert decompressed(gzip.compress(bytes(1_000)), b"gzip", 1_000) == bytes(1_000)
    with pytest.raises(TooLarge, match="The decompressed body has more than 999 bytes"):
        decompressed(gzip.compress(bytes(1_000)), b"gzip", 999)
    with pytest.raises(UnsupportedEncoding, match="Content-Encoding zstd is not supported"):
        decompressed(b"", b"zstd", 1)
    with pytest.raises(InvalidRequest, match="not compressed with gzip, its Content-Encoding"):
        decompressed(b"abc", b"gzip", 1)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_can_compress_its_requests(
    artifact: Artifact, algorithm: str, binary: bool
) -> None:
    with (
        serving(artifact) as (url, _),
        triton.InferenceServerClient(url.removeprefix("http://")) as client,
    ):
        texts = triton.InferInput("text", [2], "BYTES")
        texts.set_data_from_numpy(np.array([b"good", b"bad"], dtype=object), binary_data=binary)
        answer = client.infer("reviews", [texts], request_compression_algorithm=algorithm)
        assert answer.as_numpy("label").tolist() == [b"POSITIVE", b"NEGATIVE"]
