"""
A server that is compared: its address, and the format of its requests and answers.

A format is a dialect's name, or a mapping for a home-made server:

    {"path": "/predict", "body": {"text": "{text}"}, "label": "result.label",
     "score": "result.score"}

If none is given, the server is asked for its models and sent one text in each format, until it
answers one with a classification.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import aiohttp

from command import BadInput, BadUsage, Unavailable
from proof.plans.answers import Scores, read_scores
from proof.plans.dialects import DIALECTS, DialectName

LONGEST_S = 60.0
"""Longest wait for an answer."""
PROBE_S = 10.0
"""Longest wait for an answer while the format is found out."""
PROBE_TEXTS = 4
"""Texts that are tried: one may be over a server's limit, and the answers for two must differ."""
UNREADABLE = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)
"""What reading an answer raises if it is no classification."""
PLAIN_PATHS = ("/predict", "/classify", "/")
PLAIN_FIELDS = ("text", "inputs", "input", "sentence")
"""Paths and fields of home-made servers that are tried."""
OURS = "drbert-serve"
"""Who owns the models of our own service, in its list of models."""
SHOWN_CHARS = 160


@dataclass(frozen=True)
class Answer:
    """A server's answer for one text."""

    label: str
    """The best label, or the one that the server names."""
    scores: Mapping[str, float]
    """Score of each label in the answer."""


@dataclass(frozen=True)
class Format:
    """How one text is sent to a server, and how its answer is read."""

    name: str
    path: str
    body: Callable[[str], Any]
    """Text → the request's JSON."""
    read: Callable[[Any], Answer]
    """The answer's JSON → the answer; raises one of UNREADABLE."""
    model: str | None = None
    """The model that requests name; None: the server's default."""


@dataclass(frozen=True)
class Target:
    """One of the two servers."""

    role: str
    """`old` or `new`."""
    url: str
    """Scheme, host and port, without a slash at the end."""
    format: Format
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The URL that requests are sent to."""
        return self.url + self.format.path

    def encode(self, text: str) -> bytes:
        """Return the request's body for a text."""
        return json.dumps(self.format.body(text)).encode()


class RequestFailed(Exception):
    """A request that was not answered with a classification; the message says why."""


def read_answer(target: Target, content: bytes) -> Answer:
    """Return the answer in a body; raises RequestFailed if it is no classification."""
    try:
        return target.format.read(json.loads(content))
    except (*UNREADABLE, RecursionError):
        raise RequestFailed(f"no classification: {shown(content)}") from None


async def post(
    session: aiohttp.ClientSession, address: str, body: bytes, headers: Mapping[str, str]
) -> bytes:
    """Send a request and return the answer's body; raises RequestFailed unless it is 200."""
    try:
        async with session.post(
            address,
            data=body,
            headers={"content-type": "application/json", **headers},
            # A redirected POST becomes a GET, and headers may hold a key.
            allow_redirects=False,
        ) as response:
            content = await response.read()
            if response.status != 200:
                raise RequestFailed(f"status {response.status}: {shown(content)}")
            return content
    except TimeoutError:
        raise RequestFailed("no answer in time") from None
    except aiohttp.ClientError as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from None


def shown(content: bytes) -> str:
    """Return the begin of a body, in one line that a terminal can show."""
    text = printable(" ".join(content.decode("utf-8", "replace").split()))
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def printable(text: str) -> str:
    """Return a text whose control characters, and half characters, are replaced."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def dialect_format(name: DialectName, model: str | None) -> Format:
    """Return a dialect as a format."""
    dialect = DIALECTS[name]
    path = dialect.path.format(model=model or "")
    return Format(name, path, lambda text: dialect.body(model, text), _read_dialect, model)


def _read_dialect(body: Any) -> Answer:
    scores, label = read_scores(body)
    return _answer(scores, label)


def _answer(scores: Scores, label: str | None = None) -> Answer:
    best = max(scores, key=lambda each: each[1])[0]
    named = {printable(name): score for name, score in scores}
    return Answer(printable(best if label is None else label), named)


def parse_format(text: str, model: str | None) -> Format:
    """Return the format of a dialect's name, of a mapping as JSON, or of a file with one.

    Raises BadUsage for anything else.
    """
    if text in get_args(DialectName):
        return dialect_format(cast(DialectName, text), model)
    if text.lstrip().startswith("{"):
        return mapping_format(text, "the mapping")
    path = Path(text)
    if path.is_file():
        return mapping_format(path.read_text(encoding="utf-8"), text)
    raise BadUsage(
        f"{text} is no format: give one of {', '.join(get_args(DialectName))}, a mapping"
        ' such as \'{"path": "/predict", "body": {"text": "{text}"}, "label": "label", "score":'
        ' "score"}\', or a file with one.'
    )


def mapping_format(text: str, name: str) -> Format:
    """Return the format of a mapping in JSON; raises BadInput if a key is missing or unknown.

    `path` and `body` are the request's; "{text}" in the body stands for the text. `label` and
    `score` are the places of the best answer in the response, as `result.0.label`. With `scores`
    instead, the place of a list of {"label", "score"}.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{name} is not a JSON object.")
    unknown = sorted(values.keys() - {"path", "body", "label", "score", "scores"})
    if unknown:
        raise BadInput(
            f"{name} has an unknown key {unknown[0]!r}; known are path, body, label, score, scores."
        )
    if "path" not in values or "body" not in values or not ({"label", "scores"} & values.keys()):
        raise BadInput(f"{name} needs path, body, and label or scores.")
    body, path = values["body"], str(values["path"])
    if "{text}" not in json.dumps(body):
        raise BadInput(f'{name}: body has no "{{text}}", which stands for the text.')

    def read(answer: Any) -> Answer:
        if "scores" in values:
            entries = _at(answer, str(values["scores"]))
            return _answer([(str(each["label"]), float(each["score"])) for each in entries])
        label = printable(str(_at(answer, str(values["label"]))))
        score = float(_at(answer, str(values["score"]))) if "score" in values else 1.0
        return Answer(label, {label: score})

    return Format(
        "mapping", path if path.startswith("/") else f"/{path}", lambda t: _filled(body, t), read
    )


def _at(value: Any, place: str) -> Any:
    """Return what lies at `result.0.label` in nested dictionaries and lists."""
    for part in filter(None, place.split(".")):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _filled(body: Any, text: str) -> Any:
    """Return a body with the text in place of "{text}"."""
    if isinstance(body, dict):
        return {key: _filled(value, text) for key, value in body.items()}
    if isinstance(body, list):
        return [_filled(value, text) for value in body]
    return body.replace("{text}", text) if isinstance(body, str) else body


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
            yield _plain_format(path, field_name)


def _plain_format(path: str, field_name: str) -> Format:
    return Format(f"plain {field_name!r}", path, lambda text: {field_name: text}, _read_plain)


def _read_plain(body: Any) -> Answer:
    """Read a pipeline's answer as home-made servers pass it on."""
    if isinstance(body, dict) and "label" in body:
        label = str(body["label"])
        return Answer(label, {label: float(body.get("score", 1.0))})
    if isinstance(body, dict) and len(body) == 1:
        [body] = body.values()
    return _read_dialect(body)


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
