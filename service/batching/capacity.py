"""
Admission: how fast each model computes, measured on its batches, and which requests can therefore
be answered in time.

A request of one text, or of little work, is *light*; others are *lists*. The order in which
`service.batching.queue` takes them guarantees that

* lists get the share of the engine that they *need*, or more. With C(k) the seconds of the lists
  due up to the k-th, that is the largest C(k) / (time until the k-th is due). At that share, in
  order of deadlines, all of them are done in time.
* light requests wait for the light ones before them, with the share that lists leave.

So a list is admitted if the share needed with it is at most LIST_SHARE, or what light requests did
not use lately. A light request is admitted if those before it are done in time. Nothing that
arrives later makes an admitted request late. Only a part of a request's time is planned with.
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
"""Tokens that a text costs in addition to its own: its share of the work per batch and per row."""
CHARS_PER_TOKEN = 4
"""Characters per token of English in WordPiece, spaces included: a low estimate.

The true count is known once the text is tokenized.
"""
LIGHT_TOKENS = 32
"""A request of several texts is light up to so many tokens: a small model takes a millisecond."""
LIGHT_PLANNED, LIST_PLANNED = 0.5, 0.75
"""Shares of the time that a request has left, within which it is planned to be answered.

Many callers that arrive at once, and are refused, take processor time from an engine that was
measured without them: it became slower by a third.
"""
LIST_SHARE = 0.8
"""Share of the engine that lists may need; the rest is for light requests."""
LOAD_OVER_S = 10.0
"""Time constant of the average load of light requests."""
LOAD_GROWS = 1.25
"""Planned growth of the load of light requests while a list waits."""
FLOOR, CEILING = 0.25, 0.9
"""Shares of the engine that lists get at least and at most while light requests wait."""
TURN_S = 0.01
"""Engine seconds of a list's turn."""
TURN_TOKENS = 256
"""Tokens of a turn, at least: two rows of 128 tokens compute as many tokens a second as four."""
LONGEST_RETRY_S = 60
EPSILON_S = 1e-3

FULL_TOKENS = 128
"""A batch of so many tokens measures the cost of a token.

A smaller one is mostly overhead, unless it was as full as it gets.
"""
DECAY = 0.95
"""Weight of earlier measurements after one more batch: the last twenty or so decide."""
OUTLIER = 4.0
"""A batch counts as at most this many times its expected duration.

A processor that was taken away by another virtual machine comes back.
"""
BEST_PACE_GROWTH = 1.01
"""The best pace is raised by this factor with every batch, so some 200 slow batches replace it."""
DOUBTED_AFTER_S, DOUBT = 600.0, 0.5
"""After so long without a batch to measure, the pace may be this much better than it was measured.

It may have been measured on a machine that was busy with something else.
"""
UNMEASURED_S = 25e-6
"""Seconds per token of a model that has not run yet, for turns only: it refuses nothing."""


def estimated_tokens(chars: int, max_tokens: int | None = None) -> int:
    """Estimate the tokens of a text of `chars` characters; the model reads at most `max_tokens`."""
    tokens = 2 + chars // CHARS_PER_TOKEN
    return tokens if max_tokens is None else min(tokens, max_tokens)


@dataclass(slots=True)
class Pace:
    """Seconds per token of a model, from sums over its latest batches."""

    tokens: float = 0.0
    seconds: float = 0.0
    token_s: float = 0.0
    _best_token_s: float = 0.0
    _noted: float = -math.inf

    def best_token_s(self, now: float) -> float:
        """Return the least that a token may take on an idle engine, by the latest measurements."""
        return self._best_token_s * max(
            DOUBT, 1 - (1 - DOUBT) * (now - self._noted) / DOUBTED_AFTER_S
        )

    def note(self, tokens: float, seconds: float, now: float) -> None:
        """Count a batch of `tokens` tokens that kept the engine busy for `seconds`."""
        if self.tokens:
            seconds = min(seconds, OUTLIER * tokens * self.token_s)
        self.tokens = DECAY * self.tokens + tokens
        self.seconds = DECAY * self.seconds + seconds
        self.token_s = self.seconds / self.tokens
        self._best_token_s = (
            min(self.token_s, BEST_PACE_GROWTH * self._best_token_s) or self.token_s
        )
        self._noted = now


@dataclass
class Capacity:
    """What was admitted and is not in a batch yet, in engine seconds.

    A request is admitted as a whole or not at all.
    """

    max_texts: int
    max_queue_s: float = math.inf
    """Seconds within which everything is planned to be answered; a request's deadline holds too."""
    clock: Callable[[], float] = time.monotonic
    lists: list[Flow] = field(default_factory=list, init=False)
    """Lists that wait or are being tokenized, by when they are due."""
    _lights: OrderedDict[Flow, None] = field(default_factory=OrderedDict, init=False)
    """Light requests that wait or are being tokenized, in order of arrival."""
    light_seen: float = field(default=-1e9, init=False)
    """When the last light request arrived."""
    is_calm: bool = field(default=True, init=False)
    """Whether the last light request could have waited for twice as much as waits."""
    _light_load: float = field(default=0.0, init=False)
    """Share of the engine that light requests asked for lately, admitted or not.

    As it was when the last one arrived.
    """
    _paces: dict[str, Pace] = field(default_factory=dict, init=False)
    _light_tokens: dict[str, int] = field(default_factory=dict, init=False)
    """Tokens of light requests, by model."""
    texts: int = field(default=0, init=False)
    """Texts that wait or are being tokenized."""
    _full_since: float | None = field(default=None, init=False)

    # Pace.

    def note(self, model: str, tokens: float, seconds: float, full: bool) -> None:
        """Count a batch; `full` says that texts which might have been in it had to wait."""
        if full or tokens >= FULL_TOKENS:
            pace = self._paces.get(model)
            if pace is None:
                pace = self._paces[model] = Pace()
            pace.note(tokens, seconds, self.clock())

    def expect(self, model: str, tokens: float, seconds: float) -> None:
        """Take a batch of the warm-up for the model's pace, until others are measured."""
        pace = self._paces[model] = Pace()
        pace.note(tokens, seconds, -math.inf)

    def forget(self, model: str) -> None:
        """Forget the pace of an unloaded model."""
        self._paces.pop(model, None)

    def seconds(self, model: str, tokens: float) -> float:
        """Return how long so many tokens keep the engine busy; 0.0 if nothing was measured yet."""
        pace = self._paces.get(model)
        return 0.0 if pace is None else tokens * pace.token_s

    def turn_seconds(self, model: str, tokens: float) -> float:
        """Return the same, or a guess before the model has run: a turn always costs something."""
        return self.seconds(model, tokens) or tokens * UNMEASURED_S

    def turn_tokens(self, model: str) -> int:
        """Return the tokens of a turn, and of a batch for whose end others wait."""
        return max(TURN_TOKENS, int(TURN_S / self.turn_seconds(model, 1)))

    # Admission.

    def flow(self, model: str, texts: int, tokens: int, deadline: float) -> Flow:
        """Return the flow of a request of so many texts and tokens; it is not admitted yet."""
        tokens += TEXT_COST * texts
        light, now = texts == 1 or tokens <= LIGHT_TOKENS, self.clock()
        due = now + (LIGHT_PLANNED if light else LIST_PLANNED) * min(
            deadline - now, self.max_queue_s
        )
        return Flow(model, texts, tokens, due, light, now)

    def check_capacity(self, deadline: float = math.inf) -> None:
        """Raise Overloaded if even a request of one text and hardly any work is refused now."""
        self._check_texts(1)
        self._check_light(self.flow("", 1, 0, deadline), 0.0)

    def admit(self, flow: Flow) -> None:
        """Admit a request; raises Overloaded if there is no room now, TooLarge if never."""
        if flow.is_light:
            flow_s = self._flow_s(flow)
            self._light_load = self.light_load(flow.arrived) + flow_s / LOAD_OVER_S
            self.light_seen = flow.arrived
            self._check_texts(flow.texts)
            self._check_light(flow, flow_s)
        else:
            self._check_texts(flow.texts)
            self._check_list(flow)
        self.add(flow)

    def forgive(self, flow: Flow) -> None:
        """Do not count an admitted request as load: it needs no engine."""
        if flow.is_light:
            now = self.clock()
            asked = self._flow_s(flow) / LOAD_OVER_S
            asked *= math.exp((flow.arrived - now) / LOAD_OVER_S)
            self._light_load = max(0.0, self.light_load(now) - asked)
            self.light_seen = now

    def add(self, flow: Flow) -> None:
        """Count a request that is admitted."""
        self.texts += flow.texts
        if flow.is_light:
            self._light_tokens[flow.model] = self._light_tokens.get(flow.model, 0) + flow.tokens
            self._lights[flow] = None
        else:
            insort(self.lists, flow, key=_due_of)

    def remove(self, flow: Flow, texts: int, tokens: int) -> None:
        """Stop counting so many texts and tokens of a request."""
        self.texts -= texts
        flow.texts -= texts
        flow.tokens -= tokens
        if flow.is_light:
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
        """Raise Overloaded if the light requests before one of `flow_s` seconds make it late."""
        ahead_s = self._light_s() if self._light_tokens else 0.0
        left_s = max(0.0, flow.due - flow.arrived)
        # Without lists a turn takes no longer than all that waits does.
        self.is_calm = not ahead_s or (not self.lists and 2 * (ahead_s + flow_s) <= left_s)
        if self.is_calm:
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
        """Check that lists do not need too much with it, and that it makes no light request late.

        Raises TooLarge if an idle engine is too slow for it, else Overloaded.
        """
        pace, now = self._paces.get(flow.model), flow.arrived
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
            # Nothing is ahead of it. If the pace was measured in a bad moment, it corrects that.
            return
        insort(self.lists, flow, key=_due_of)
        need, _ = self.need()
        listed_s = sum([self._flow_s(each) for each in self.lists if each.due <= flow.due])
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
        """Raise Overloaded; `room_in_s` is when there will be room, if nobody else takes it."""
        if self._full_since is None and not self._half_free():
            self._full_since = self.clock()
        raise Overloaded(message, retry_after_s=max(1, min(LONGEST_RETRY_S, math.ceil(room_in_s))))

    # How full it is.

    @property
    def queue_s(self) -> float:
        """Engine seconds of everything that was admitted and is not in a batch yet."""
        return self._light_s() + sum([self._flow_s(flow) for flow in self.lists])

    @property
    def full_for_s(self) -> float:
        """Seconds since a request was refused, until half of the queue is free again; else 0."""
        since = self._full_since
        return 0.0 if since is None else self.clock() - since

    def need(self) -> tuple[float, float]:
        """Return the engine share that lists need, and when the list that decides it is due."""
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
        """Return the share of the engine that light requests asked for lately."""
        return self._light_load * math.exp((self.light_seen - now) / LOAD_OVER_S)

    def share_of_lists(self, need: float) -> float:
        """Return the share of the engine that lists get while light requests wait."""
        return min(CEILING, max(FLOOR, need)) if self.lists else 0.0

    def _lights_late(self, share: float) -> bool:
        """Return whether a waiting light request is late if lists have that share of the engine."""
        now, before_s = self.clock(), self._turn_s()
        for flow in self._lights:
            before_s += self._flow_s(flow)
            if before_s / (1 - share) > flow.due - now:
                return True
        return False

    def _turn_s(self) -> float:
        """Return the seconds of the longest turn: nothing is answered before the end of one."""
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
