"""
One model: text to tokens, and tokens to logits.

Only here the tokenizer and the runtime meet. Nothing here knows HTTP or queues. Export verifies
artifacts with this class.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from service.artifact import Artifact, Manifest
from service.batching.packing import Layout, first_token_slots, most_texts
from service.batching.shapes import Shapes
from service.errors import InvalidInput, ModelOutputInvalid
from service.requests.entities import Offsets
from service.runtimes import Inputs, Logits, Runtime
from service.tokenization.limits import read_tokenizer
from service.tokenization.truncation import (
    CHARS_PER_TOKEN,
    GROWTH,
    MARGIN_CHARS,
    Boundaries,
    Side,
    reliable,
    truncate_pair,
)
from service.tokenization.vocabulary import Vocabulary, first_id

# Names of the padding token. Behind a mask any id would do, but some families count positions from
# the tokens that are not padding.
PADDING = ("[PAD]", "<pad>")
# Tokens that neighbouring windows of a long text share by default.
DEFAULT_STRIDE = 64
# Tokens of longer texts are held in arrays: two lists of 128 tokens take nine kilobytes, and
# thousands of texts may wait.
MAX_LIST_TOKENS = 32

Array = npt.NDArray[np.int64]
Truncate = Literal["right", "left", "none"]


@dataclass(slots=True)  # not frozen: several are made per request, and that costs more
class Encoded:
    """A text as the model reads it."""

    ids: Sequence[int]
    type_ids: Sequence[int]
    truncated: bool
    windows: int = 1
    """Number of windows of a long text that it stands for."""
    tokens_of_windows: int | None = None
    """Tokens of these windows together, if they are not its own."""
    offsets: Offsets | None = None
    """The characters of each token; None where the model labels whole texts."""

    @property
    def tokens(self) -> int:
        """Token count, special tokens included."""
        return len(self.ids) if self.tokens_of_windows is None else self.tokens_of_windows


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens that a tokenizer puts around a text: [CLS] and [SEP], or a family's own."""

    before: list[int]
    after: list[int]
    types_before: list[int]
    types_after: list[int]
    type: int
    """Token type id of the text itself."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """Return a tokenizer's special tokens, found by encoding one letter."""
        probe = tokenizer.encode("a")
        text = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        first, last = (text[0], text[-1] + 1) if text else (1, 1)
        ids, types = probe.ids, probe.type_ids
        text_type = types[first] if text else 0
        return cls(ids[:first], ids[last:], types[:first], types[last:], text_type)


class Classifier:
    """A loaded artifact: its tokenizer, its engine, and the shapes of its batches."""

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
        self._shapes_run: set[tuple[int, int, int]] = set()
        self.warm_batch: tuple[int, float] | None = None
        """Tokens of the largest warm-up batch, and the seconds that it took when run again."""
        # One tokenizer for all kinds of truncation: to make one holds the interpreter for 0.2 to
        # 0.4 s with 250,000 tokens.
        self._tokenizer = Tokenizer.from_buffer(read_tokenizer(artifact))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._pad = first_id(self._tokenizer, PADDING) or 0
        self.vocabulary = Vocabulary(self._tokenizer)
        self._special = SpecialTokens.of(self._tokenizer)
        around_text = len(self._special.before) + len(self._special.after)
        self._room = self.manifest.max_tokens - around_text
        special_counts = [
            self._tokenizer.num_special_tokens_to_add(pair)
            for pair in (False, self.manifest.takes_pairs)
        ]
        if max(special_counts) >= self.manifest.max_tokens:
            raise ValueError(
                "its tokenizer puts so many tokens around a text that none is left of the"
                f" {self.manifest.max_tokens} that the model reads"
            )
        self._room_of_pair = self.manifest.max_tokens - special_counts[1]
        # encode_batch_fast gives both halves of a pair the type 0, unless the post-processor sets
        # types (tokenizers 0.22).
        [fast] = self._tokenizer.encode_batch_fast([("a", "a")])
        self._fast_pairs = fast.type_ids == self._tokenizer.encode("a", "a").type_ids
        self._boundaries = Boundaries.of(self._tokenizer)

    @property
    def padding_invariant(self) -> bool:
        """Whether padding changes no answer."""
        return self.manifest.padding_invariant

    def encode(
        self,
        text: str,
        pair: str | None = None,
        truncate: Truncate | None = None,
        release_gil: bool = False,
        max_tokens: int | None = None,
        keeps_pair: bool = False,
        pair_tokens: int | None = None,
    ) -> Encoded:
        """Return the tokens of a text or a pair.

        They are cut on the side of `truncate`, by default the checkpoint's own; raises InvalidInput
        if they are too many and `truncate` is `none`. `max_tokens` cuts to fewer than the model
        reads, special tokens included; raises InvalidInput if it leaves no room for the text. Of a
        pair the longer half is cut first, or with `keeps_pair` only `text`; before, `pair` is cut
        to `pair_tokens`.
        `release_gil` lets other threads run meanwhile, which a thread next to the event loop should
        ask for.
        """
        limit = self.manifest.max_tokens
        if max_tokens is not None:
            limit = min(max_tokens, limit)
        shorter = self.manifest.max_tokens - limit
        room, room_of_pair = self._room - shorter, self._room_of_pair - shorter
        free = room if pair is None else room_of_pair
        if free < 1:
            special = limit - free
            raise InvalidInput(
                f"truncate_prompt_tokens is {max_tokens}, and a"
                f" {'text' if pair is None else 'pair'} has {special} special tokens; give at least"
                f" {special + 1}.",
                param="truncate_prompt_tokens",
            )
        side: Side = (
            self.manifest.truncation_side if truncate is None or truncate == "none" else truncate
        )
        if self.manifest.labels_tokens:
            return self._encode_for_tokens(text, room, side, truncate == "none", release_gil)
        tokens = None
        if pair is None:
            tokens = self._tokens_of_part(text, room + 1, side)
        elif keeps_pair:
            text = self._part(text, room_of_pair + 1, side) or text
        if pair is not None and pair_tokens is not None:
            pair = self._part(pair, pair_tokens + 1, "right") or pair
        if tokens is None:
            encoding = self._encode((text,) if pair is None else (text, pair), True, release_gil)
            ids: list[int] = encoding.ids
            is_whole = pair_tokens is None or encoding.sequence_ids.count(1) <= pair_tokens
            if len(ids) <= limit and is_whole:
                return self._with_tokens(ids, encoding.type_ids, False)
        if truncate == "none" and (tokens is not None or len(ids) > limit):
            is_part = tokens is not None or keeps_pair
            count = len(ids) if tokens is None else len(tokens) + limit - room
            raise InvalidInput(
                f"It has {'at least ' if is_part else ''}{count} tokens, the model reads"
                f" {self.manifest.max_tokens}, and truncate is none."
            )
        if pair is not None:
            types = encoding.type_ids
            indices = truncate_pair(encoding, room_of_pair, side, keeps_pair, pair_tokens)
            return self._with_tokens([ids[i] for i in indices], [types[i] for i in indices], True)
        if tokens is None:
            tokens = ids[len(self._special.before) : len(ids) - len(self._special.after)]
        cut = tokens[:room] if side == "right" else tokens[len(tokens) - room :]
        return replace(self._with_special_tokens(cut), truncated=True)

    def _encode_for_tokens(
        self, text: str, room: int, side: Side, refuses: bool, release_gil: bool
    ) -> Encoded:
        """Return at most `room` tokens of a text and the special ones, with their characters."""
        ids, spans = self.tokens_with_offsets(text, release_gil, room + 1, side)
        if len(ids) > room and refuses:
            special = self.manifest.max_tokens - self._room
            raise InvalidInput(
                f"It has at least {len(ids) + special} tokens, the model reads {room + special},"
                " and truncate is none."
            )
        cut = slice(room) if side == "right" else slice(max(0, len(ids) - room), None)
        encoded = self._with_special_tokens(ids[cut])
        offsets = Offsets.of(spans[cut], *self.special_tokens)
        # An empty text without special tokens has one token for padding.
        offsets = offsets if len(offsets.starts) else Offsets.of([], 1)
        return replace(encoded, truncated=len(ids) > room, offsets=offsets)

    def tokens_with_offsets(
        self, text: str, release_gil: bool = False, enough: int | None = None, side: Side = "right"
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text of any length, without special tokens, and their characters.

        These are the first character of each in `text`, and the one after its last. With `enough`,
        return at least so many of the first ones, or for `left` of the last ones.
        """
        part = text
        if enough is not None:
            part = self._part(text, enough, side) or text
        if release_gil:
            # Only the batch functions of tokenizers release the GIL; the fast one has no offsets.
            [encoding] = self._tokenizer.encode_batch([part], add_special_tokens=False)
        else:
            encoding = self._tokenizer.encode(part, add_special_tokens=False)
        skipped = len(text) - len(part) if side == "left" else 0
        return encoding.ids, [(start + skipped, end + skipped) for start, end in encoding.offsets]

    def whole(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Encoded:
        """Return a text of any length with special tokens, and its tokens' characters."""
        offsets = Offsets.of(spans, *self.special_tokens)
        return replace(self._with_special_tokens(ids), offsets=offsets)

    @property
    def special_tokens(self) -> tuple[int, int]:
        """How many special tokens are put before a text's tokens, and after them."""
        return len(self._special.before), len(self._special.after)

    def tokens(self, text: str, release_gil: bool = False, enough: int | None = None) -> list[int]:
        """Return the tokens of a text of any length, without special tokens, to cut into windows.

        With `enough`, return at least so many of the first ones.
        """
        tokens = None if enough is None else self._tokens_of_part(text, enough, "right")
        if tokens is None:
            tokens = self._encode((text,), False, release_gil).ids
        return tokens

    def _encode(
        self, texts: tuple[str] | tuple[str, str], special: bool, release_gil: bool
    ) -> Encoding:
        if not release_gil:
            return self._tokenizer.encode(*texts, add_special_tokens=special)
        # Only the batch functions of tokenizers release the GIL.
        encode = (
            self._tokenizer.encode_batch_fast
            if len(texts) == 1 or self._fast_pairs
            else self._tokenizer.encode_batch
        )
        [encoding] = encode([texts[0] if len(texts) == 1 else texts], add_special_tokens=special)
        return encoding

    def _tokens_of_part(self, text: str, enough: int, side: Side) -> list[int] | None:
        """Return at least `enough` tokens of a long text without reading all of it.

        They are its first ones, or for `left` its last ones. Return None if the text is not that
        long, has fewer tokens, or cannot be cut.
        """
        part = self._part_with_tokens(text, enough, side)
        return None if part is None else part[1]

    def _part(self, text: str, enough: int, side: Side) -> str | None:
        """Return the part of a long text that has at least `enough` of its tokens.

        They are its first ones, or for `left` its last ones. Return None if the text is not that
        long, has fewer tokens, or cannot be cut.
        """
        part = self._part_with_tokens(text, enough, side)
        return None if part is None else part[0]

    def _part_with_tokens(self, text: str, enough: int, side: Side) -> tuple[str, list[int]] | None:
        chars = CHARS_PER_TOKEN * enough + MARGIN_CHARS
        while self._boundaries is not None and 2 * chars < len(text):
            part = self._boundaries.cut(text, chars, side)
            if part is None:
                return None
            [encoding] = self._tokenizer.encode_batch([part], add_special_tokens=False)
            count = reliable(encoding.offsets, len(part), side)
            if count >= enough:
                ids: list[int] = encoding.ids
                return part, ids[:count] if side == "right" else ids[len(ids) - count :]
            chars *= GROWTH
        return None

    def window_starts(self, tokens: int, stride: int | None = None) -> range:
        """Return where the windows of so many tokens begin; neighbours share `stride` tokens.

        The default is DEFAULT_STRIDE, or half a window if that is less. Raises InvalidInput if a
        window would add no token.
        """
        stride = min(DEFAULT_STRIDE, self._room // 2) if stride is None else stride
        if stride >= self._room:
            raise InvalidInput(
                f"A window holds {self._room} tokens of the text, so with a stride of {stride} no"
                f" window adds a token; give at most {self._room - 1}."
            )
        return range(0, max(1, tokens - stride), self._room - stride)

    def tokens_in_windows(self, windows: int, stride: int | None = None) -> int:
        """Return the most tokens that a text of so many windows has.

        Raises InvalidInput as `window_starts` does.
        """
        return (windows - 1) * self.window_starts(0, stride).step + self._room

    def window(self, tokens: Sequence[int], start: int) -> Encoded:
        """Return the window of a text's tokens that begins at `start`, with special tokens."""
        return self._with_special_tokens(tokens[start : start + self._room])

    def _with_special_tokens(self, tokens: Sequence[int]) -> Encoded:
        special = self._special
        types = [special.type] * len(tokens)
        return self._with_tokens(
            [*special.before, *tokens, *special.after],
            [*special.types_before, *types, *special.types_after],
            False,
        )

    def _with_tokens(self, ids: list[int], type_ids: list[int], truncated: bool) -> Encoded:
        # An empty encoding becomes a single padding token: the engine cannot run zero tokens.
        if not ids:
            return Encoded([self._pad], [0], truncated)
        if len(ids) > MAX_LIST_TOKENS:
            return Encoded(array("i", ids), array("b", type_ids), truncated)
        return Encoded(ids, type_ids, truncated)

    def start(
        self, batch: Sequence[Encoded], layout: Layout | None = None
    ) -> Callable[[], Logits | list[Logits]]:
        """Hand a batch to the engine; the function returned waits for its logits.

        These are of shape (len(batch), labels), or (tokens, labels) for each text if the model
        labels tokens. `layout` says where the texts of a packed batch are; without it they are laid
        out here. The function raises ModelOutputInvalid if the model answers NaN, infinity or the
        wrong shape.
        """
        inputs, places = self._inputs(batch, layout)
        pending = self.runtime.start(inputs)
        expected = (len(batch), len(self.manifest.labels))

        def finish() -> Logits | list[Logits]:
            logits = pending()
            if self.manifest.labels_tokens:
                return self._by_text(logits, batch, places, inputs["input_ids"].shape)
            if logits.ndim == 2 and len(logits) > max(places):
                # A packed batch asks the engine for more first tokens than it has texts.
                logits = logits[places]
            if logits.shape != expected:
                raise ModelOutputInvalid(
                    f"The model answered logits of shape {logits.shape}; expected {expected}."
                )
            if not np.isfinite(logits).all():
                raise ModelOutputInvalid("The model answered NaN or infinity.")
            return logits

        return finish

    def _by_text(
        self,
        logits: Logits,
        batch: Sequence[Encoded],
        places: Sequence[int],
        shape: tuple[int, ...],
    ) -> list[Logits]:
        """Return the logits of each text's tokens, (tokens, labels), from those of all rows."""
        expected = (*shape, len(self.manifest.labels))
        if logits.shape != expected:
            raise ModelOutputInvalid(
                f"The model answered logits of shape {logits.shape}; expected {expected}."
            )
        rows = logits.reshape(-1, logits.shape[2])
        # Copies: a slice would keep the logits of the whole batch.
        texts = [
            rows[place : place + item.tokens].copy()
            for place, item in zip(places, batch, strict=True)
        ]
        if not all(np.isfinite(text).all() for text in texts):
            raise ModelOutputInvalid("The model answered NaN or infinity.")
        return texts

    def has_run(self, rows: int, length: int, texts: int = 1) -> bool:
        """Return whether a batch of that shape has been run, by the warm-up or by a request.

        `texts` is the largest number of texts in a row.
        """
        return self._shape_key(rows, length, texts) in self._shapes_run

    def _shape_key(self, rows: int, length: int, texts: int) -> tuple[int, int, int]:
        # Where rows may be padding, the engine distinguishes the sizes that they are filled up to.
        if self.packing is None:
            return self.shapes.rows(min(rows, self.shapes.max_batch_size)), length, 1
        return rows, length, first_token_slots(rows, length, texts)

    def predict(self, batch: Sequence[Encoded]) -> Logits:
        """Return the logits of a batch, of shape (len(batch), labels).

        If the model labels tokens, they are those of the tokens of all texts, (tokens, labels).
        """
        logits = self.start(batch)()
        return np.concatenate(logits) if isinstance(logits, list) else logits

    def predict_all(self, texts: Sequence[Encoded]) -> Logits:
        """Return what `predict` does for any number of texts, in the batches of the service."""
        if not texts:
            return np.empty((0, len(self.manifest.labels)), np.float32)
        rows: list[Logits] = [np.empty(0, np.float32)] * len(texts)
        for batch in self.batches([text.tokens for text in texts]):
            logits = self.start([texts[index] for index in batch])()
            for index, row in zip(batch, logits, strict=True):
                rows[index] = np.atleast_2d(row)
        return np.concatenate(rows)

    def batches(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return the indices of texts of these token counts, in batches as the service makes them.

        They are in their order, and each batch is as large as it may be.
        """
        if self.packing is None:
            size = self.shapes.max_batch_size if self.padding_invariant else 1
            return [
                list(range(first, min(first + size, len(tokens))))
                for first in range(0, len(tokens), size)
            ]
        batches, waiting = [], list(range(len(tokens)))
        while waiting:
            chosen, _ = self.packing.choose([tokens[index] for index in waiting])
            batch = [waiting[index] for index in chosen]
            batches.append(batch)
            in_batch = set(batch)
            waiting = [index for index in waiting if index not in in_batch]
        return batches

    def padded_length(self, tokens: int) -> int:
        """Return the length to which a text is padded: its own, if padding changes answers."""
        return self.shapes.length(tokens) if self.padding_invariant else tokens

    def warm_up(
        self,
        seconds: float,
        stopping: Callable[[], bool] = lambda: False,
        max_text_tokens: int | None = None,
    ) -> int:
        """Run shapes for at most `seconds`, least work first, and return how many were run.

        Where the engine captures shapes, all of them are run. `stopping` ends it early. With
        `max_text_tokens`, only shapes that texts of at most so many tokens can make are run.
        """
        started, done = time.monotonic(), 0
        if max_text_tokens is None or self.shapes.grid.warm_up_all:
            max_text_tokens = self.manifest.max_tokens
        batches = list(self.shapes.examples(max_text_tokens))
        if self.shapes.grid.warm_up_all:
            # The device memory that the largest shape needs serves all others.
            batches.reverse()
        for texts in batches:
            late = time.monotonic() - started > seconds and not self.shapes.grid.warm_up_all
            if done and (stopping() or late):
                break
            self.predict(self.padding(texts))
            done += 1
        largest = max(batches[:done], key=sum)
        self.warm_batch = sum(largest), min(self._seconds(largest) for _ in range(2))
        return done

    def _seconds(self, texts: Sequence[int]) -> float:
        started = time.monotonic()
        self.predict(self.padding(texts))
        return time.monotonic() - started

    def padding(self, texts: Sequence[int]) -> list[Encoded]:
        """Return texts of these token counts that are all padding."""
        return [Encoded([self._pad] * tokens, [0] * tokens, False) for tokens in texts]

    def _lay_out(self, batch: Sequence[Encoded]) -> Layout:
        if self.packing is not None:
            return self.packing.lay_out([item.tokens for item in batch])
        length = self.padded_length(max([item.tokens for item in batch]))
        return Layout(length, tuple([(index,) for index in range(len(batch))]))

    def _inputs(self, batch: Sequence[Encoded], layout: Layout | None) -> tuple[Inputs, list[int]]:
        """Return what the engine reads, and for each text the index of its logits.

        If the model labels tokens, it is that of its first token, counted over all rows.
        """
        if layout is None:
            layout = self._lay_out(batch)
        shape = (len(layout.rows), layout.length)
        texts = most_texts(layout)
        slots = first_token_slots(*shape, texts)
        self._shapes_run.add(self._shape_key(*shape, texts))
        ids = np.full(shape, self._pad, np.int64)
        mask, types, positions = (np.zeros(shape, np.int64) for _ in range(3))
        first_tokens = np.zeros((len(layout.rows), slots), np.int64)
        places = [0] * len(batch)
        for row, indices in enumerate(layout.rows):
            end = 0
            for number, index in enumerate(indices, 1):
                item, begin = batch[index], end
                end += item.tokens
                ids[row, begin:end] = item.ids
                mask[row, begin:end] = number
                types[row, begin:end] = item.type_ids
                positions[row, begin:end] = np.arange(item.tokens)
                if self.manifest.labels_tokens:
                    places[index] = row * layout.length + begin
                else:
                    first_tokens[row, number - 1] = begin
                    places[index] = row * slots + number - 1
        arrays: dict[str, Array] = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
        }
        inputs = {name: arrays[name] for name in self.manifest.inputs}
        if self.packing is not None:
            inputs["position_ids"] = positions
        if self.manifest.labels_tokens:
            return inputs, places
        if self.packing is not None:
            inputs["first_tokens"] = first_tokens
        else:
            places = list(range(len(batch)))
        return inputs, places
