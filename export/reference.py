"""
What the torch model itself answers: the reference every compiled variant is held against.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from command import BadInput

TextOrPair = str | tuple[str, str]

TEXTS: tuple[TextOrPair, ...] = (
    "a charming and often affecting journey",
    "bad",
    "It's not that the film is dull; it is that nothing in it was ever alive.",
    "The waiter brought the wrong dish twice, apologised once, and charged us for both.",
    "Ein Satz auf Deutsch, mit Umlauten: Übergröße, ärgerlich, schön.",
    "Great value. Would buy again. Arrived two days early and the box was intact!!!",
    "2 + 2 = 5 for sufficiently large values of 2",
    "¿Qué? – “quotes”, emoji 🙂 and a zero\u200bwidth space",
    "no apparent joy",
    "The committee will meet on Tuesday to discuss the minutes of the previous meeting.",
    "I wanted to love it, and for twenty minutes I did, but then the plot forgot what it was about and so did I.",
    "unflinchingly bleak and desperate",
    "A " * 40 + "end.",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "This sentence is repeated until no model of this family can read all of it. " * 90,
    ("Is the film any good?", "The film is very good."),
)
"""Short, long, over-long, not English, not words, and a pair."""
PROBES = tuple(TEXTS[place] for place in (0, 1, 4, 7, 12, 13, 15))
"""Those of the self-check at every start: of every kind, but few, and none that costs a slow processor a second."""


class Reference:
    """A torch classifier and its tokenizer, as transformers runs them."""

    def __init__(self, model: nn.Module, tokenizer: Path, max_tokens: int) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
        self.inputs = ("input_ids", "attention_mask", "token_type_ids")

    @torch.no_grad()
    def logits(self, texts: Sequence[TextOrPair]) -> npt.NDArray[np.float32]:
        """Logits of each text run alone, (texts, labels)."""
        rows = []
        for text in texts:
            accepted = {name: torch.from_numpy(value) for name, value in self.encode(text).items()}
            try:
                rows.append(self.model(**accepted).logits[0].numpy())
            except (IndexError, RuntimeError) as error:
                tokens = accepted["input_ids"].shape[1]
                raise BadInput(f"The checkpoint's own model cannot read a text of {tokens} tokens: {str(error).splitlines()[0]}") from None
        return np.stack(rows)

    def encode(self, text: TextOrPair) -> dict[str, npt.NDArray[np.int64]]:
        """What the model is given of a text, (1, L) each."""
        first, second = text if isinstance(text, tuple) else (text, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoded = self.tokenizer(
                first, second, truncation="longest_first", max_length=self.max_tokens, return_tensors="np",
                return_token_type_ids=True,
            )
        return {name: encoded[name].astype(np.int64) for name in self.inputs if name in encoded and self._takes(name)}

    def _takes(self, name: str) -> bool:
        # A tokenizer may number sentences for a model that has one type of them.
        if name == "token_type_ids" and getattr(self.model.config, "type_vocab_size", 2) < 2:
            return False
        return name in self.model.forward.__code__.co_varnames
