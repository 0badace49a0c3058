"""
One model: text to tokens, and tokens to logits.

The tokenizer and the runtime meet here and nowhere else. Nothing here knows of
HTTP or of queues; export verifies artifacts with this very class.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from service.artifact import Artifact, Manifest
from service.batching.packing import Layout, slots
from service.batching.shapes import Shapes
from service.errors import InvalidInput, ModelOutputInvalid
from service.runtimes import Inputs, Logits, Runtime
from service.tokenization.limits import read_tokenizer
from service.tokenization.truncation import (
    CHARS_PER_TOKEN,
    GROWTH,
    MARGIN_CHARS,
    Boundaries,
    Side,
    kept_of_pair,
    reliable,
)

# What families call padding. Any id would do where the mask is heeded, but positions may be counted
# from what is not padding.
PADDING = ("[PAD]", "<pad>")
# Tokens that neighbouring windows of a long text share, unless a caller says otherwise.
STRIDE = 64
# Tokens of longer texts are kept as arrays: of 128 tokens two lists are nine kilobytes, and
# thousands of texts may wait.
KEPT_AS_LISTS = 32

Truncate = Literal["right", "left", "none"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as the model reads it."""

    ids: Sequence[int]
    type_ids: Sequence[int]
    truncated: bool
    windows: int = 1
    """How many windows of a long text it stands for."""

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a tokenizer puts around a text: [CLS] and [SEP], or what the family has in their
    place.
    """

    before: list[int]
    after: list[int]
    types_before: list[int]
    types_after: list[int]
    type: int
    """Of the text itself."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame:
        probe = tokenizer.encode("a")
        own = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        first, last = (own[0], own[-1] + 1) if own else (1, 1)
        ids, types = probe.ids, probe.type_ids
        return cls(ids[:first], ids[last:], types[:first], types[last:], types[first] if own else 0)


class Classifier:
    def __init__(
        self,
        artifact: Artifact,
        runtime: Runtime,
        max_batch_size: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.manifest: Manifest = artifact.manifest
        self.runtime = runtime
        self.shapes = Shapes(
            self.manifest.max_tokens, max_batch_size, runtime.grid, max_batch_tokens
        )
        self.packing = self.shapes.packing
        self.warm_batch: tuple[int, float] | None = None
        """Tokens of the largest batch of the warm-up, and the seconds that it took when it was run
        again.
        """
        # One for all kinds of truncation: nothing else runs while it is made, for 0.2 to 0.4 s with
        # 250,000 tokens.
        self._tokenizer = Tokenizer.from_buffer(read_tokenizer(artifact))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._pad = next(
            (found for name in PADDING if (found := self._tokenizer.token_to_id(name)) is not None),
            0,
        )
        self._frame = Frame.of(self._tokenizer)
        self._room = self.manifest.max_tokens - len(self._frame.before) - len(self._frame.after)
        around = [
            self._tokenizer.num_special_tokens_to_add(pair)
            for pair in (False, self.manifest.takes_pairs)
        ]
        if max(around) >= self.manifest.max_tokens:
            raise ValueError(
                "its tokenizer puts so many tokens around a text that none is left of the"
                f" {self.manifest.max_tokens} that the model reads"
            )
        self._room_of_pair = self.manifest.max_tokens - around[1]
        # encode_batch_fast gives both halves the type 0, unless the post-processor sets types
        # (tokenizers 0.22).
        [fast] = self._tokenizer.encode_batch_fast([("a", "a")])
        self._fast_pairs = fast.type_ids == self._tokenizer.encode("a", "a").type_ids
        self._boundaries = Boundaries.of(self._tokenizer)

    @property
    def padding_safe(self) -> bool:
        return self.manifest.padding_safe

    def encode(
        self,
        text: str,
        pair: str | None = None,
        truncate: Truncate | None = None,
        beside: bool = False,
        most: int | None = None,
    ) -> Encoded:
        """Tokens of a text or a pair, cut on the checkpoint's own side unless told otherwise;
        InvalidInput if they are too many and must not be cut.

        `beside` lets other threads go on meanwhile, which is what a thread beside the event loop
        should ask for. `most` is how many tokens stay, those around the text among them, if that is
        less than the model reads; InvalidInput if it leaves no room for the text.
        """
        limit = self.manifest.max_tokens if most is None else min(most, self.manifest.max_tokens)
        shorter = self.manifest.max_tokens - limit
        room, room_of_pair = self._room - shorter, self._room_of_pair - shorter
        left = room if pair is None else room_of_pair
        if left < 1:
            around = limit - left
            raise InvalidInput(
                f"truncate_prompt_tokens is {most}, and {around} tokens stand around a"
                f" {'text' if pair is None else 'pair'}; give at least {around + 1}.",
                param="truncate_prompt_tokens",
            )
        side: Side = (
            self.manifest.truncation_side if truncate is None or truncate == "none" else truncate
        )
        tokens = None if pair is not None else self._tokens_of_part(text, room + 1, side)
        if tokens is None:
            encoding = self._encode((text,) if pair is None else (text, pair), True, beside)
            ids: list[int] = encoding.ids
            if len(ids) <= limit:
                return self._with_tokens(ids, encoding.type_ids, False)
        if truncate == "none":
            count = f"{len(ids)}" if tokens is None else f"at least {len(tokens) + limit - room}"
            raise InvalidInput(
                f"It has {count} tokens, the model reads {self.manifest.max_tokens}, and truncate"
                " is none."
            )
        if pair is not None:
            types, kept = encoding.type_ids, kept_of_pair(encoding, room_of_pair, side)
            return self._with_tokens(
                [ids[place] for place in kept], [types[place] for place in kept], True
            )
        if tokens is None:
            tokens = ids[len(self._frame.before) : len(ids) - len(self._frame.after)]
        return replace(
            self._framed(tokens[:room] if side == "right" else tokens[len(tokens) - room :]),
            truncated=True,
        )

    def tokens(self, text: str, beside: bool = False, enough: int | None = None) -> list[int]:
        """All tokens of a text of any length, or the first ones and at least `enough`, without
        those that frame it; to be cut into windows.
        """
        tokens = None if enough is None else self._tokens_of_part(text, enough, "right")
        if tokens is None:
            tokens = self._encode((text,), False, beside).ids
        return tokens

    def _encode(self, texts: tuple[str] | tuple[str, str], special: bool, beside: bool) -> Encoding:
        if not beside:
            return self._tokenizer.encode(*texts, add_special_tokens=special)
        # Only its batches let go of the interpreter.
        encode = (
            self._tokenizer.encode_batch_fast
            if len(texts) == 1 or self._fast_pairs
            else self._tokenizer.encode_batch
        )
        [encoding] = encode([texts[0] if len(texts) == 1 else texts], add_special_tokens=special)
        return encoding

    def _tokens_of_part(self, text: str, enough: int, side: Side) -> list[int] | None:
        """At least `enough` tokens of a long text, the first ones or for `left` the last, without
        reading all of it.

        None where the text is not that long, has fewer tokens, or cannot be cut.
        """
        chars = CHARS_PER_TOKEN * enough + MARGIN_CHARS
        while self._boundaries is not None and 2 * chars < len(text):
            part = self._boundaries.cut(text, chars, side)
            if part is None:
                return None
            [encoding] = self._tokenizer.encode_batch([part], add_special_tokens=False)
            count = reliable(encoding.offsets, len(part), side)
            if count >= enough:
                ids: list[int] = encoding.ids
                return ids[:count] if side == "right" else ids[len(ids) - count :]
            chars *= GROWTH
        return None

    def window_starts(self, tokens: int, stride: int | None = None) -> range:
        """Where the windows of so many tokens begin, each sharing `stride` of them with the one
        before.

        By default STRIDE, or half a window if that is less. InvalidInput if a window is left
        nothing of its own.
        """
        stride = min(STRIDE, self._room // 2) if stride is None else stride
        if stride >= self._room:
            raise InvalidInput(
                f"A window holds {self._room} tokens of the text, so a stride of {stride} leads"
                f" nowhere; give at most {self._room - 1}."
            )
        return range(0, max(1, tokens - stride), self._room - stride)

    def tokens_in_windows(self, windows: int, stride: int | None = None) -> int:
        """The most tokens that a text of so many windows has; InvalidInput as for
        `window_starts`.
        """
        return (windows - 1) * self.window_starts(0, stride).step + self._room

    def window(self, tokens: Sequence[int], start: int) -> Encoded:
        """The window of a text's tokens that begins there, framed as a text of its own."""
        return self._framed(tokens[start : start + self._room])

    def _framed(self, own: Sequence[int]) -> Encoded:
        """A single text of these tokens, with those around it."""
        frame = self._frame
        return self._with_tokens(
            [*frame.before, *own, *frame.after],
            [*frame.types_before, *([frame.type] * len(own)), *frame.types_after],
            False,
        )

    def _with_tokens(self, ids: list[int], type_ids: list[int], truncated: bool) -> Encoded:
        """A text that a tokenizer without special tokens leaves nothing of is one token of padding,
        for no answer is that of no token.
        """
        if len(ids) > KEPT_AS_LISTS:
            return Encoded(array("i", ids), array("b", type_ids), truncated)
        return Encoded(ids, type_ids, truncated) if ids else Encoded([self._pad], [0], truncated)

    def start(self, batch: Sequence[Encoded]) -> Callable[[], Logits]:
        """Hands a batch to the runtime; the call returned waits for its logits, (len(batch),
        labels).

        That call raises ModelOutputInvalid if the model answered NaN, infinity or the wrong shape.
        """
        pending = self.runtime.start(self._inputs(batch))
        wanted = (len(batch), len(self.manifest.labels))

        def finish() -> Logits:
            logits = pending()[
                : len(batch)
            ]  # Where texts share rows, the engine is asked for more.
            if logits.shape != wanted:
                raise ModelOutputInvalid(
                    f"The model answered shape {logits.shape}, {wanted} was due."
                )
            if not np.isfinite(logits).all():
                raise ModelOutputInvalid("The model answered NaN or infinity.")
            return logits

        return finish

    def predict(self, batch: Sequence[Encoded]) -> Logits:
        """Logits of a batch, (len(batch), labels)."""
        return self.start(batch)()

    def batches(self, tokens: Sequence[int]) -> list[list[int]]:
        """Places of texts of so many tokens, in batches as the service may make of them: in their
        order, each as large as one may be.
        """
        if self.packing is None:
            size = self.shapes.max_batch_size if self.padding_safe else 1
            return [
                list(range(first, min(first + size, len(tokens))))
                for first in range(0, len(tokens), size)
            ]
        batches, waiting = [], list(range(len(tokens)))
        while waiting:
            lengths = [tokens[place] for place in waiting]
            batch = [waiting[place] for place in self.packing.choose(lengths)]
            batches.append(batch)
            in_batch = set(batch)
            waiting = [place for place in waiting if place not in in_batch]
        return batches

    def padded_length(self, tokens: int) -> int:
        """How long a text of so many tokens is made; only a model that ignores padding gets any."""
        return self.shapes.length(tokens) if self.padding_safe else tokens

    def warm_up(self, seconds: float, stopping: Callable[[], bool] = lambda: False) -> int:
        """Runs the likeliest shapes for at most so long, or all where the runtime captures them,
        and says how many it ran.
        """
        started, done = time.monotonic(), 0
        batches = [
            texts for shape in self.shapes.likely_first() if (texts := self.shapes.texts_of(*shape))
        ]
        if self.shapes.grid.all_warm:
            # What the largest needs of the device's memory serves all others.
            batches.reverse()
        for texts in batches:
            late = time.monotonic() - started > seconds and not self.shapes.grid.all_warm
            if done and (stopping() or late):
                break
            self.predict(self._padding(texts))
            done += 1
        largest = max(batches[:done], key=sum)
        self.warm_batch = sum(largest), min(self._seconds(largest) for _ in range(2))
        return done

    def _seconds(self, texts: Sequence[int]) -> float:
        began = time.monotonic()
        self.predict(self._padding(texts))
        return time.monotonic() - began

    def _padding(self, texts: Sequence[int]) -> list[Encoded]:
        """Texts of so many tokens, all of them padding."""
        return [Encoded([self._pad] * tokens, [0] * tokens, False) for tokens in texts]

    def _inputs(self, batch: Sequence[Encoded]) -> Inputs:
        if self.packing is None:
            layout = Layout(
                self.padded_length(max(item.tokens for item in batch)),
                tuple((place,) for place in range(len(batch))),
            )
        else:
            layout = self.packing.lay_out([item.tokens for item in batch])
        shape = (len(layout.rows), layout.length)
        ids = np.full(shape, self._pad, np.int64)
        mask, types, positions = (np.zeros(shape, np.int64) for _ in range(3))
        first_tokens = np.zeros(slots(len(batch)), np.int64)
        for row, places in enumerate(layout.rows):
            end = 0
            for number, place in enumerate(places, 1):
                item, begin = batch[place], end
                end += item.tokens
                ids[row, begin:end] = item.ids
                mask[row, begin:end] = number
                types[row, begin:end] = item.type_ids
                positions[row, begin:end] = np.arange(item.tokens)
                first_tokens[place] = row * layout.length + begin
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        inputs = {name: arrays[name] for name in self.manifest.inputs}
        return (
            inputs
            if self.packing is None
            else {**inputs, "position_ids": positions, "first_tokens": first_tokens}
        )
