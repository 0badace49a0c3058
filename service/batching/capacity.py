"""
How fast each model computes, measured on its batches, and which calls can therefore be answered in
time.

A call of one text, or of little work, is *light*; others are *lists*. `service.batching.queue`
takes them in such an order that

* lists get the share of the engine that they *need*, or more: with C(k) the seconds of those due up
  to the k-th, the largest C(k) / (time until the k-th is due). At that share, in order of
  deadlines, all of them are done in time.
* light calls wait for the light ones before them, with what lists leave of the engine.

So a list is admitted if the share needed with it is at most LIST_SHARE, or what light calls have
left of late; a light call if those before it are done in time. Neither is made late by what comes
later. Only a part of a call's time is planned with.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from service.batching.requests import Flow
from service.errors import Overloaded, TooLarge

TEXT_COST = 1
"""Tokens that a text costs beside its own: its share of the work that every batch and every row
brings.
"""
CHARS_PER_TOKEN = 4
"""Of English in WordPiece, spaces counted, or rather fewer; what a text has in fact is known once
it is tokenized.
"""
LIGHT_TOKENS = 32
"""A call of several texts is light up to so many tokens: all of it takes a millisecond of a small
model.
"""
LIGHT_PLANNED, LIST_PLANNED = 0.5, 0.75
"""Of the time that a call has left, the part in which it is to be answered. Many callers who come
at once, and are refused, take processor time from an engine that was measured without them: it was
seen to become slower by a third.
"""
LIST_SHARE = 0.8
"""Of the engine the part that lists may need: light calls have the rest for themselves."""
LOAD_OVER_S = 10.0
"""Over how long the load of light calls is averaged."""
LOAD_GROWS = 1.25
"""What light calls may ask for while a list waits, by what they asked for before it came."""
FLOOR, CEILING = 0.25, 0.9
"""Of the engine, what lists get at least and at most while light calls wait."""
TURN_S = 0.01
"""Seconds of the engine in a list's turn."""
TURN_TOKENS = 256
"""Of which it has at least so many: two rows of 128 tokens were measured to compute as many a
second as four do.
"""
LONGEST_RETRY_S = 60
EPSILON_S = 1e-3

FULL_TOKENS = 128
"""From so many tokens on a batch says what a token costs; of a smaller one much is overhead, unless
it was as full as it gets.
"""
KEPT = 0.95
"""How much of what was measured still counts after one more batch: the last twenty or so decide."""
OUTLIER = 4.0
"""A batch that took so many times as long as expected counts as if it had taken this many: a
processor that was taken away comes back.
"""
RELAXED = 1.01
"""The best pace is forgotten by so much with every batch: after some two hundred slow ones it is
theirs.
"""
DOUBTED_AFTER_S, DOUBT = 600.0, 0.5
"""After so long without a batch that says more, it may be this much better: it was measured on a
machine that was busy otherwise.
"""
UNMEASURED_S = 25e-6
"""Seconds for a token of a model that has not run yet, for taking turns only: nothing is refused by
it.
"""


def estimated_tokens(chars: int, max_tokens: int | None = None) -> int:
    """Tokens of a text of so many characters, before it is tokenized; `max_tokens` is what the
    model reads of it.
    """
    tokens = 2 + chars // CHARS_PER_TOKEN
    return tokens if max_tokens is None else min(tokens, max_tokens)


@dataclass(slots=True)
class Pace:
    """Seconds that a model takes for a token, from sums over its latest batches."""

    tokens: float = 0.0
    seconds: float = 0.0
    token_s: float = 0.0
    _best_token_s: float = 0.0
    _noted: float = -math.inf

    def best_token_s(self, now: float) -> float:
        """The least that a token may take on an idle engine, by what was measured lately."""
        return self._best_token_s * max(
            DOUBT, 1 - (1 - DOUBT) * (now - self._noted) / DOUBTED_AFTER_S
        )

    def note(self, tokens: float, seconds: float, now: float) -> None:
        """Counts a batch of so many tokens, which kept the engine busy for so long."""
        if self.tokens:
            seconds = min(seconds, OUTLIER * tokens * self.token_s)
        self.tokens = KEPT * self.tokens + tokens
        self.seconds = KEPT * self.seconds + seconds
        self.token_s = self.seconds / self.tokens
        self._best_token_s = min(self.token_s, RELAXED * self._best_token_s) or self.token_s
        self._noted = now


@dataclass
class Capacity:
    """What was admitted and is not in a batch yet, in seconds of the engine; all of it or nothing
    of a call.
    """

    max_texts: int
    max_queue_s: float = math.inf
    """Within so many seconds everything is planned to be answered; a call's own deadline holds too.
    """
    clock: Callable[[], float] = time.monotonic
    lists: list[Flow] = field(default_factory=list, init=False)
    """Those that wait and those that are tokenized, by when they are due."""
    _lights: OrderedDict[Flow, None] = field(default_factory=OrderedDict, init=False)
    """Light calls that wait and those that are tokenized, in order of arrival."""
    light_seen: float = field(default=-1e9, init=False)
    """When the last light call came."""
    calm: bool = field(default=True, init=False)
    """Whether the light call that came last could have waited for twice as much as waits."""
    _light_load: float = field(default=0.0, init=False)
    """Of the engine, what light calls asked for of late, admitted or not; as it was when the last
    one came.
    """
    _paces: dict[str, Pace] = field(default_factory=dict, init=False)
    _light_tokens: dict[str, int] = field(default_factory=dict, init=False)
    """Of these, by model."""
    texts: int = field(default=0, init=False)
    """Those that wait and those that are tokenized."""
    _full_since: float | None = field(default=None, init=False)

    # Pace.

    def note(self, model: str, tokens: float, seconds: float, full: bool) -> None:
        """Counts a batch; `full`: texts that might have been in it had to wait."""
        if full or tokens >= FULL_TOKENS:
            pace = self._paces.get(model)
            if pace is None:
                pace = self._paces[model] = Pace()
            pace.note(tokens, seconds, self.clock())

    def expect(self, model: str, tokens: float, seconds: float) -> None:
        """Takes what a batch took while the model was warmed up for its pace, until others are
        measured.
        """
        pace = self._paces[model] = Pace()
        pace.note(tokens, seconds, -math.inf)

    def forget(self, model: str) -> None:
        """Forgets the pace of a model that is let go of."""
        self._paces.pop(model, None)

    def seconds(self, model: str, tokens: float) -> float:
        """How long so many tokens keep the engine busy; 0.0 while nothing of the model is
        measured.
        """
        pace = self._paces.get(model)
        return 0.0 if pace is None else tokens * pace.token_s

    def turn_seconds(self, model: str, tokens: float) -> float:
        """The same, with a guess for a model that has not run: a turn always costs something."""
        return self.seconds(model, tokens) or tokens * UNMEASURED_S

    def turn_tokens(self, model: str) -> int:
        """Tokens of a turn, and of a batch for whose end others wait."""
        return max(TURN_TOKENS, int(TURN_S / self.turn_seconds(model, 1)))

    # Admission.

    def flow(self, model: str, texts: int, tokens: int, deadline: float) -> Flow:
        """The place of a call whose texts have so many tokens together; it is not admitted yet."""
        tokens += TEXT_COST * texts
        light, now = texts == 1 or tokens <= LIGHT_TOKENS, self.clock()
        due = now + (LIGHT_PLANNED if light else LIST_PLANNED) * min(
            deadline - now, self.max_queue_s
        )
        return Flow(model, texts, tokens, due, light, now)

    def check_room(self, deadline: float = math.inf) -> None:
        """Overloaded if even a call of one text and next to no work would be refused just now."""
        self._check_texts(1)
        self._check_light(self.flow("", 1, 0, deadline), 0.0)

    def admit(self, flow: Flow) -> None:
        """Counts a call: Overloaded if there is no room just now, TooLarge if there never is."""
        if flow.light:
            flow_s = self._flow_s(flow)
            self._light_load = self.light_load(flow.since) + flow_s / LOAD_OVER_S
            self.light_seen = flow.since
            self._check_texts(flow.texts)
            self._check_light(flow, flow_s)
        else:
            self._check_texts(flow.texts)
            self._check_list(flow)
        self.add(flow)

    def add(self, flow: Flow) -> None:
        """Counts a call that is admitted."""
        self.texts += flow.texts
        if flow.light:
            self._light_tokens[flow.model] = self._light_tokens.get(flow.model, 0) + flow.tokens
            self._lights[flow] = None
        else:
            insort(self.lists, flow, key=_due_of)

    def remove(self, flow: Flow, texts: int, tokens: int) -> None:
        """Counts so many texts and tokens of a call no more."""
        self.texts -= texts
        flow.texts -= texts
        flow.tokens -= tokens
        if flow.light:
            self._light_tokens[flow.model] -= tokens
            if not flow.texts:
                del self._lights[flow]
            if not self._light_tokens[flow.model]:
                del self._light_tokens[flow.model]
        elif not flow.texts:
            self.lists.remove(flow)
        if self._full_since is not None and self._half_free():
            self._full_since = None

    def _check_texts(self, texts: int) -> None:
        if (excess := self.texts + texts - self.max_texts) > 0:
            self._refuse(
                f"{self.texts} texts wait and {texts} more would pass the limit of"
                f" {self.max_texts}; retry later.",
                self.queue_s * min(1.0, excess / max(1, self.texts)),
            )

    def _check_light(self, flow: Flow, flow_s: float) -> None:
        """Overloaded if the light calls before one of so many seconds, with what lists leave of the
        engine, would make it late.
        """
        ahead_s = self._light_s() if self._light_tokens else 0.0
        left_s = max(0.0, flow.due - flow.since)
        # Without lists a turn takes no longer than all that waits does.
        self.calm = not ahead_s or (not self.lists and 2 * (ahead_s + flow_s) <= left_s)
        if self.calm:
            return
        wait_s = (ahead_s + flow_s + self._turn_s()) / (1 - self.share_of_lists(self.need()[0]))
        if wait_s > left_s:
            self._refuse(
                f"The request would wait {wait_s:.2g} s and may wait {left_s:.2g} s,"
                f" {LIGHT_PLANNED:.0%} of the time that it has left; retry later, or give it more"
                " time.",
                wait_s - left_s,
            )

    def _check_list(self, flow: Flow) -> None:
        """TooLarge if an idle engine is too slow for it; Overloaded if lists would need too much,
        or light calls be late by it.
        """
        pace, now = self._paces.get(flow.model), flow.since
        least_s = 0.0 if pace is None else flow.tokens * pace.best_token_s(now)
        most_s = LIST_SHARE * max(0.0, flow.due - now)
        if least_s > most_s:
            raise TooLarge(
                f"The {flow.texts} texts have about {flow.tokens} tokens, which take {least_s:.2g}"
                f" s; a list may take {most_s:.2g} s, {LIST_SHARE * LIST_PLANNED:.0%} of the time"
                f" that it has left. Send at most {max(1, int(flow.texts * most_s / least_s))} such"
                " texts a request, or give it more time.",
                param="input",
            )
        if not self.texts:
            # Nobody is ahead of it; if the pace was measured in a bad moment, this list corrects
            # it.
            return
        insort(self.lists, flow, key=_due_of)
        need, _ = self.need()
        listed_s = sum([self._flow_s(one) for one in self.lists if one.due <= flow.due])
        lights_late = need <= LIST_SHARE and self._lights_late(self.share_of_lists(need))
        self.lists.remove(flow)
        share = max(FLOOR, min(LIST_SHARE, 1 - LOAD_GROWS * self.light_load(now)))
        if need > share or lights_late:
            most_s = share * max(0.0, flow.due - now)
            self._refuse(
                f"The {flow.texts} texts have about {flow.tokens} tokens, which take"
                f" {self._flow_s(flow):.2g} s, and with the lists before them {listed_s:.2g} s;"
                f" lists may take {most_s:.2g} s, {share * LIST_PLANNED:.0%} of the time that this"
                " one has left. Retry later, or send fewer texts a request.",
                self._light_s() + max(0.0, listed_s - most_s),
            )

    def _refuse(self, message: str, room_in_s: float) -> None:
        """Raises Overloaded; `room_in_s`: when there will be room, if nobody else takes it."""
        if self._full_since is None and not self._half_free():
            self._full_since = self.clock()
        raise Overloaded(message, retry_after_s=max(1, min(LONGEST_RETRY_S, math.ceil(room_in_s))))

    # How full it is.

    @property
    def queue_s(self) -> float:
        """How long the engine needs for all that was admitted and is not in a batch yet."""
        return self._light_s() + sum([self._flow_s(flow) for flow in self.lists])

    @property
    def full_s(self) -> float:
        """For how long there has been no room: since a call was refused, until half of the queue is
        free again.
        """
        since = self._full_since
        return 0.0 if since is None else self.clock() - since

    def need(self) -> tuple[float, float]:
        """The share of the engine that lists need to be done in time, and when the one is due that
        decides it.
        """
        now = self.clock()
        before_s = share = 0.0
        decides = -math.inf
        for flow in self.lists:
            before_s += self._flow_s(flow)
            needed = before_s / max(EPSILON_S, flow.due - now)
            if needed > share:
                share, decides = needed, flow.due
        return share, decides

    def light_load(self, now: float) -> float:
        """Of the engine, what light calls asked for of late."""
        return self._light_load * math.exp((self.light_seen - now) / LOAD_OVER_S)

    def share_of_lists(self, need: float) -> float:
        """What lists get of the engine while light calls wait."""
        return min(CEILING, max(FLOOR, need)) if self.lists else 0.0

    def _lights_late(self, share: float) -> bool:
        """Whether a light call that waits would be late if lists had so much of the engine."""
        now, before_s = self.clock(), self._turn_s()
        for flow in self._lights:
            before_s += self._flow_s(flow)
            if before_s / (1 - share) > flow.due - now:
                return True
        return False

    def _turn_s(self) -> float:
        """How long the longest turn takes of what waits: nothing is answered before the end
        of one.
        """
        models = {*self._light_tokens, *(flow.model for flow in self.lists)}
        return min(
            self.queue_s, max(self.seconds(model, self.turn_tokens(model)) for model in models)
        )

    def _light_s(self) -> float:
        seconds = 0.0
        for model, tokens in self._light_tokens.items():
            seconds += self.seconds(model, tokens)
        return seconds

    def _flow_s(self, flow: Flow) -> float:
        return self.seconds(flow.model, flow.tokens)

    def _half_free(self) -> bool:
        return (
            self.texts <= self.max_texts // 2
            and self.queue_s <= LIGHT_PLANNED * self.max_queue_s / 2
        )


def _due_of(flow: Flow) -> float:
    return flow.due
