"""
A request's texts as items for the batcher, and the batcher's rows as one for each text: apart from
windows they are the same.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service import answers
from service.batching.requests import Row
from service.classifier import Classifier, Encoded
from service.errors import DeadlineExceeded, InvalidInput, TooLarge
from service.host.executors import Executors, Steps
from service.schemas import ClassifyRequest, Limits, Pool, Text, Window

# What would take the event loop longer than so many characters do, a millisecond or two, goes to a
# thread.
CHARS_ON_THE_LOOP = 1_000
# What a text costs beside its characters, in characters.
CHARS_OF_A_TEXT = 20
# Longer requests have threads of their own, so that they do not delay shorter ones, and let each
# other pass about so often.
LONG_CHARS = 16_384
STEP_CHARS = 2_048


@dataclass(frozen=True, slots=True)
class Items:
    """Items for the batcher, in the order of the texts."""

    items: list[Encoded]
    windows: list[int] | None = None
    """How many of them are each text's; None where every text is one item."""


async def encode(
    classifier: Classifier,
    asked: ClassifyRequest,
    limits: Limits,
    executors: Executors,
    deadline: float = math.inf,
) -> Items:
    """Items of every text; one text that cannot be used fails the list and is named.

    DeadlineExceeded if `deadline`, of the monotonic clock, comes first; Overloaded if too many
    requests are being tokenized.
    """
    cost = sum([_cost(text) for text in asked.input])
    if cost <= CHARS_ON_THE_LOOP:
        found = _all_at_once(_encode(classifier, asked, limits, False))
    else:
        found = await _encode_beside(
            classifier, asked, limits, executors, cost > LONG_CHARS, deadline
        )
    if (
        limits.tokens is not None
        and (tokens := sum([item.tokens for item in found.items])) > limits.tokens
    ):
        raise TooLarge(
            f"input has {tokens} tokens, the limit of a request is {limits.tokens}; send several"
            " requests.",
            param="input",
        )
    return found


def _cost(text: Text) -> int:
    return CHARS_OF_A_TEXT + len(text.text) + len(text.pair or "")


def _all_at_once(steps: Steps[Items]) -> Items:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Items = end.value
            return found


async def _encode_beside(
    classifier: Classifier,
    asked: ClassifyRequest,
    limits: Limits,
    executors: Executors,
    long: bool,
    deadline: float,
) -> Items:
    """In a thread, which ends with its text when nobody waits for it any more."""
    executor = executors.tokenizing_long if long else executors.tokenizing
    try:
        async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()):
            return await executor.run_steps(_encode(classifier, asked, limits, True))
    except TimeoutError:
        raise DeadlineExceeded(
            "The texts took longer to tokenize than the request's time limit."
        ) from None


def by_text(found: Items, rows: list[Row], pool: Pool) -> tuple[Sequence[Encoded], list[Row]]:
    """Tokens and row of each text: those of its windows together, with the times of the slowest."""
    if found.windows is None:
        return found.items, rows
    texts, own = [], []
    end = 0
    for count in found.windows:
        start, end = end, end + count
        items, theirs = found.items[start:end], rows[start:end]
        slowest = max(theirs, key=lambda row: row.queue_ns + row.inference_ns)
        texts.append(
            Encoded(
                [number for item in items for number in item.ids],
                [],
                any(item.truncated for item in items),
                count,
            )
        )
        own.append(replace(slowest, value=answers.pooled([row.value for row in theirs], pool)))
    return texts, own


def _encode(
    classifier: Classifier, asked: ClassifyRequest, limits: Limits, beside: bool
) -> Steps[Items]:
    """The items, with a pause behind about every STEP_CHARS; `beside` the event loop, in a
    thread.
    """
    items: list[Encoded] = []
    windows: list[int] = []
    cost = 0
    for text in asked.input:
        if cost > STEP_CHARS:
            cost = 0
            yield
        cost += _cost(text)
        if asked.window is None:
            items.append(_one(classifier, text, asked, beside))
            continue
        own = _windows(classifier, text, asked.window, limits, beside)
        if limits.items is not None and len(items) + len(own) > limits.items:
            raise TooLarge(
                f"input makes more windows than the {limits.items} that the queue holds; send"
                " several requests.",
                param="input",
            )
        items += own
        windows.append(len(own))
    return Items(items, None if asked.window is None else windows)


def _one(classifier: Classifier, text: Text, asked: ClassifyRequest, beside: bool) -> Encoded:
    if text.pair is not None and not classifier.manifest.takes_pairs:
        where = f"{text.where}.text_pair"
        raise InvalidInput(f"{where}: this model takes single texts only.", param=where)
    try:
        return classifier.encode(text.text, text.pair, asked.truncate, beside, asked.most_tokens)
    except InvalidInput as error:
        if error.param is not None:
            raise
        raise InvalidInput(f"{text.where}: {error.message}", param=text.where) from None


def _windows(
    classifier: Classifier, text: Text, window: Window, limits: Limits, beside: bool
) -> list[Encoded]:
    if text.pair is not None:
        where = f"{text.where}.text_pair"
        raise InvalidInput(
            f"{where}: windows are of single texts; classify a pair without them.", param=where
        )
    try:
        # One token more than the windows hold shows that there is another window.
        enough = (
            classifier.tokens_in_windows(
                1 if window.pool == "first" else limits.windows, window.stride
            )
            + 1
        )
        tokens = classifier.tokens(text.text, beside, enough)
        starts = classifier.window_starts(len(tokens), window.stride)
    except InvalidInput as error:
        raise InvalidInput(f"window.stride: {error.message}", param="window.stride") from None
    if window.pool == "first":
        # What is never looked at is not computed.
        return [replace(classifier.window(tokens, 0), truncated=len(starts) > 1)]
    if len(starts) > limits.windows:
        raise TooLarge(
            f"{text.where} takes at least {len(starts)} windows, the limit is {limits.windows};"
            " send it in parts.",
            param=text.where,
        )
    return [classifier.window(tokens, start) for start in starts]
