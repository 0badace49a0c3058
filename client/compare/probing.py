"""
Finds out the format of a server: it is asked for its models and sent a few texts in each format,
until it answers one with a classification.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence

import aiohttp

from client.compare.formats import (
    UNREADABLE,
    Answer,
    Format,
    dialect_format,
    parse_format,
    plain_format,
)
from client.compare.target import RequestFailed, Target, post, read_answer
from command import BadUsage, Unavailable

PROBE_S = 10.0
"""Longest wait for an answer while the format is found out."""
PROBE_TEXTS = 4
"""Texts that are tried: one may be over a server's limit, and the answers for two must differ."""
PLAIN_PATHS = ("/predict", "/classify", "/")
PLAIN_FIELDS = ("text", "inputs", "input", "sentence")
"""Paths and fields of home-made servers that are tried."""
OURS = "drbert-serve"
"""Who owns the models of our own service, in its list of models."""


async def choose_target(
    session: aiohttp.ClientSession,
    target: Callable[[Format], Target],
    given: str | None,
    model: str | None,
    texts: Sequence[str],
) -> Target:
    """Return a server with its format, which has answered one of the texts.

    `target` makes the server of a format. `given` is a format's name or mapping; without it, the
    first one is taken in which the server answers. Raises Unavailable if it does not answer.
    """
    base = target(dialect_format("drbert", model))
    listed, owner = await _models(session, base)
    if model is not None and listed and model not in listed:
        raise BadUsage(
            f"--{base.role}-model {model}: the {base.role} server has {', '.join(listed)}."
        )
    first = model if model is not None else next(iter(listed), None)
    if given is None:
        candidates = list(_candidates(model, first, is_ours=owner == OURS))
    else:
        needs_model = given in ("infinity", "kserve-v1")
        candidates = [parse_format(given, first if needs_model else model)]
    tried: list[str] = []
    deaf: Target | None = None
    for candidate in candidates:
        one = target(candidate)
        try:
            answers = await _answers_of(session, one, texts[:PROBE_TEXTS])
        except RequestFailed as failure:
            if "Cannot connect" in str(failure):
                raise Unavailable(
                    f"The {base.role} server does not answer at {base.url}: {failure}"
                ) from None
            if str(failure).startswith(("status 401", "status 403")):
                raise Unavailable(
                    f"The {base.role} server at {base.url} asks for a key ({failure}); put its"
                    f" header into a variable and name that with --{base.role}-headers."
                ) from None
            tried.append(f"{candidate.name} at {candidate.path}: {failure}")
            continue
        if given is not None or len(answers) == 1 or len(set(map(str, answers))) > 1:
            return one
        # The same answer for every text: the server may read the text from another field.
        deaf = deaf or one
    if deaf is not None:
        return deaf
    remedy = "is the format right?" if given else f"name its format with --{base.role}-format."
    raise Unavailable(
        f"The {base.role} server at {base.url} answers in no known format; {remedy} Tried:"
        f" {'; '.join(tried[:6])}"
    )


async def _answers_of(
    session: aiohttp.ClientSession, target: Target, texts: Sequence[str]
) -> list[Answer]:
    """Return the answers that a server gives for texts; raises RequestFailed if it gives none."""
    answers: list[Answer] = []
    failed: RequestFailed | None = None
    for text in texts:
        try:
            async with asyncio.timeout(PROBE_S):
                content = await post(session, target.address, target.encode(text), target.headers)
            answers.append(read_answer(target, content))
        except TimeoutError:
            raise RequestFailed(f"no answer within {PROBE_S:g} s") from None
        except RequestFailed as failure:
            failed = failure
            if "Cannot connect" in str(failure) or "status 404" in str(failure):
                break
    if not answers and failed is not None:
        raise failed
    return answers


def _candidates(model: str | None, first: str | None, is_ours: bool) -> Iterator[Format]:
    """Yield formats to try; `model` was asked for, `first` is it or the first that is listed."""
    # Ours is a superset of vLLM's, which accepts requests without a model too.
    for name in dict.fromkeys((model, first if model is None else model)):
        yield dialect_format("drbert" if is_ours else "vllm", name)
    yield dialect_format("infinity", first)
    if first is not None:
        yield dialect_format("kserve-v1", first)
    if model is not None:
        return  # The other formats name no model: the server's default would answer.
    yield dialect_format("tei", None)
    yield dialect_format("hf", None)
    for path in PLAIN_PATHS:
        for field_name in PLAIN_FIELDS:
            yield plain_format(path, field_name)


async def _models(session: aiohttp.ClientSession, target: Target) -> tuple[list[str], str | None]:
    """Return the names of the models that a server lists, in any of three formats, and who made it.

    Both are empty if it lists none.
    """
    for path in ("/v1/models", "/models"):
        try:
            async with (
                asyncio.timeout(PROBE_S),
                session.get(target.url + path, headers=dict(target.headers)) as response,
            ):
                listed = json.loads(await response.read())
            entries = listed.get("data") or listed.get("models")
            names = [str(each["id"] if isinstance(each, dict) else each) for each in entries]
            owner = entries[0].get("owned_by") if isinstance(entries[0], dict) else None
        except (aiohttp.ClientError, TimeoutError, *UNREADABLE):
            continue
        return names, owner
    return [], None
