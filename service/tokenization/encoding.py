"""
A request's texts as items for the batcher, and the batcher's results as one result for each text.

A text is one item, unless it is cut into windows.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service import answers
from service.batching.requests import Result
from service.classifier import Classifier, Encoded
from service.errors import DeadlineExceeded, InvalidInput, TooLarge
from service.host.executors import Executor, Executors, Steps
from service.requests.entities import joined_windows
from service.schemas import ClassifyRequest, Limits, Pool, Text, Window

# More characters than these take a millisecond or two to tokenize, so a thread does it.
MAX_CHARS_ON_LOOP = 1_000
# What a text costs in addition to its characters, in characters.
TEXT_OVERHEAD_CHARS = 20
# Longer requests have threads of their own, so that they do not delay shorter ones.
LONG_CHARS = 16_384
# After so many characters, a long request lets another one have the thread.
STEP_CHARS = 2_048


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class Items:
    """Items for the batcher, in the order of the texts."""

    items: list[Encoded]
    windows: list[int] | None = None
    """For each text, how many items are its windows; None if every text is one item."""
    whole: list[WholeText] | None = None
    """Each text that is cut into windows, whole; None where the model labels whole texts."""


@dataclass(slots=True)
class WholeText:
    """The tokens of a long text, and where its windows begin."""

    encoded: Encoded
    starts: Sequence[int]
    """The first token of each window."""
    special: tuple[int, int]
    """Special tokens before and after the tokens of a window."""


async def encode(
    classifier: Classifier,
    request: ClassifyRequest,
    limits: Limits,
    executors: Executors,
    deadline: float = math.inf,
) -> Items:
    """Return the items of every text.

    Raises InvalidInput or TooLarge, naming the text, if one cannot be used; DeadlineExceeded if
    `deadline`, in seconds of time.monotonic(), passes first; Overloaded if too many requests are
    being tokenized.
    """
    cost = sum([_cost(text) for text in request.input])
    if cost <= MAX_CHARS_ON_LOOP:
        encoded = _run_all(_encode(classifier, request, limits, release_gil=False))
    else:
        executor = executors.tokenizing_long if cost > LONG_CHARS else executors.tokenizing
        steps = _encode(classifier, request, limits, release_gil=True)
        encoded = await _run_in_thread(executor, steps, deadline)
    if limits.tokens is not None:
        tokens = sum([item.tokens for item in encoded.items])
        if tokens > limits.tokens:
            raise TooLarge(
                f"input has {tokens} tokens, the limit of a request is {limits.tokens}; send"
                " several requests.",
                param="input",
            )
    return encoded


def _cost(text: Text) -> int:
    return TEXT_OVERHEAD_CHARS + len(text.text) + len(text.pair or "")


def _run_all(steps: Steps[Items]) -> Items:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            items: Items = end.value
            return items


async def _run_in_thread(executor: Executor, steps: Steps[Items], deadline: float) -> Items:
    """Run the steps in a thread, which stops after a text when nobody waits any more."""
    timeout_s = None if math.isinf(deadline) else deadline - time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            return await executor.run_steps(steps)
    except TimeoutError:
        raise DeadlineExceeded(
            "The texts took longer to tokenize than the request's time limit."
        ) from None


def merge_windows(
    encoded: Items, results: list[Result], pool: Pool
) -> tuple[Sequence[Encoded], list[Result]]:
    """Return the tokens and the result of each text.

    Those of its windows are put together, with the times of the slowest window.
    """
    if encoded.windows is None:
        return encoded.items, results
    texts, merged = [], []
    end = 0
    for number, count in enumerate(encoded.windows):
        start, end = end, end + count
        windows, parts = encoded.items[start:end], results[start:end]
        slowest = max(parts, key=lambda part: part.queue_ns + part.inference_ns)
        cached = all(part.cached for part in parts)
        if encoded.whole is not None:
            whole = encoded.whole[number]
            logits = [part.value for part in parts]
            value = joined_windows(logits, whole.starts, *whole.special)
            tokens = sum(window.tokens for window in windows)
            texts.append(replace(whole.encoded, windows=count, tokens_of_windows=tokens))
            merged.append(replace(slowest, value=value, cached=cached))
            continue
        ids = list(itertools.chain.from_iterable(window.ids for window in windows))
        truncated = any(window.truncated for window in windows)
        texts.append(Encoded(ids, [], truncated, count))
        value = answers.pooled([part.value for part in parts], pool)
        merged.append(replace(slowest, value=value, cached=cached))
    return texts, merged


def _encode(
    classifier: Classifier, request: ClassifyRequest, limits: Limits, release_gil: bool
) -> Steps[Items]:
    """Encode the texts, with a pause after about every STEP_CHARS characters."""
    items: list[Encoded] = []
    windows: list[int] = []
    whole: list[WholeText] = []
    cost = 0
    for text in request.input:
        if cost > STEP_CHARS:
            cost = 0
            yield
        cost += _cost(text)
        _check_pair(classifier, text)
        if request.window is None:
            items.append(_encode_text(classifier, text, request, release_gil))
            continue
        if classifier.manifest.labels_tokens:
            text_windows, tokens = _token_windows(
                classifier, text, request.window, limits, release_gil
            )
            whole.append(tokens)
        else:
            text_windows = _windows(classifier, text, request.window, limits, release_gil)
        if limits.items is not None and len(items) + len(text_windows) > limits.items:
            raise TooLarge(
                f"input makes more windows than the {limits.items} that the queue holds; send"
                " several requests.",
                param="input",
            )
        items += text_windows
        windows.append(len(text_windows))
    return Items(items, None if request.window is None else windows, whole or None)


def _check_pair(classifier: Classifier, text: Text) -> None:
    if text.pair is not None and not classifier.manifest.takes_pairs:
        field = f"{text.field}.text_pair"
        raise InvalidInput(f"{field}: this model takes single texts only.", param=field)


def _encode_text(
    classifier: Classifier, text: Text, request: ClassifyRequest, release_gil: bool
) -> Encoded:
    try:
        return classifier.encode(
            text.text,
            text.pair,
            request.truncate,
            release_gil,
            request.max_tokens,
            text.keeps_pair,
            text.pair_tokens,
        )
    except InvalidInput as error:
        if error.param is not None:
            raise
        raise InvalidInput(f"{text.field}: {error.message}", param=text.field) from None


def _windows(
    classifier: Classifier, text: Text, window: Window, limits: Limits, release_gil: bool
) -> list[Encoded]:
    if text.pair is not None:
        field = f"{text.field}.text_pair"
        raise InvalidInput(
            f"{field}: windows are of single texts; classify a pair without them.", param=field
        )
    try:
        # One token more than the windows hold shows that there is another window.
        most = 1 if window.pool == "first" else limits.windows
        enough = classifier.tokens_in_windows(most, window.stride) + 1
        tokens = classifier.tokens(text.text, release_gil, enough)
        starts = classifier.window_starts(len(tokens), window.stride)
    except InvalidInput as error:
        raise InvalidInput(f"window.stride: {error.message}", param="window.stride") from None
    if window.pool == "first":
        # The other windows would not be used, so they are not computed.
        return [replace(classifier.window(tokens, 0), truncated=len(starts) > 1)]
    _check_windows(text, starts, limits)
    return [classifier.window(tokens, start) for start in starts]


def _token_windows(
    classifier: Classifier, text: Text, window: Window, limits: Limits, release_gil: bool
) -> tuple[list[Encoded], WholeText]:
    """Return a text's windows, and its tokens with the characters of each."""
    try:
        enough = classifier.tokens_in_windows(limits.windows, window.stride) + 1
        ids, spans = classifier.tokens_with_offsets(text.text, release_gil, enough)
        starts = classifier.window_starts(len(ids), window.stride)
    except InvalidInput as error:
        raise InvalidInput(f"window.stride: {error.message}", param="window.stride") from None
    _check_windows(text, starts, limits)
    windows = [classifier.window(ids, start) for start in starts]
    return windows, WholeText(classifier.whole(ids, spans), starts, classifier.special_tokens)


def _check_windows(text: Text, starts: Sequence[int], limits: Limits) -> None:
    if len(starts) > limits.windows:
        raise TooLarge(
            f"{text.field} takes at least {len(starts)} windows, the limit is {limits.windows};"
            " send it in parts.",
            param=text.field,
        )
