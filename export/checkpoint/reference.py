"""
What transformers itself answers: the reference every compiled variant is held against.

It reads the checkpoint's folder as a user would (`AutoTokenizer`,
`AutoModelForSequenceClassification`), and shares nothing with the graph: neither how weights were
placed, nor the form of attention, nor how texts become tokens.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from command import BadInput, first_line
from export.checkpoint.config import read_config
from export.checkpoint.loading import Checkpoint, quiet

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
    (
        "I wanted to love it, and for twenty minutes I did, but then the plot forgot what it was"
        " about and so did I."
    ),
    "unflinchingly bleak and desperate",
    "A " * 40 + "end.",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "This sentence is repeated until no model of this family can read all of it. " * 90,
    ("Is the film any good?", "The film is very good."),
    " a space before the first word",
    "two  spaces, a\ttab and\na line's end ",
    "UPPER, Title and lower: ÀÉÎÕÜ àéîõü, İstanbul, STRAẞE, ŒUVRE",
    "cafe\u0301 and café, ﬁne ﬁsh, Ⅷ, ①, ½, ｆｕｌｌ ｗｉｄｔｈ",
    "この映画は本当に素晴らしかったです。",
    "这部电影真的很好看，我很喜欢。",
    "이 영화는 정말 훌륭했어요.",
    "Этот фильм был действительно хорош.",
    "هذا الفيلم كان رائعا حقا.",
    "यह फिल्म वास्तव में अच्छी थी।",
    "ภาพยนตร์เรื่องนี้ดีมาก",
    (
        "don't, o'clock, rock'n'roll, e-mail@example.com, https://example.com/a?b=c#d, $3.50,"
        " 1,000,000"
    ),
    "#hashtag @user :) <b>bold</b> {json: [1, 2]} 👩‍👩‍👧‍👦 🇫🇷",
    "a\u00a0no-break space, a\u00adsoft hyphen, a\ufeffmark, a\x07bell",
    ("The first half is short.", "The second half goes on. " * 80),
    ("The first half goes on. " * 80, "The second half is short."),
    ("Both halves go on. " * 60, "Neither of them stops. " * 60),
)
"""Short, long, over-long, not English, not words, in other cases and scripts, and pairs."""
PROBES = tuple(TEXTS[place] for place in (0, 1, 4, 7, 12, 13, 15))
"""Those of the self-check at every start: of every kind, but few, and none that costs a slow
processor a second.
"""


SPECIAL_TEXTS = 24
"""At most so many of a checkpoint's own added tokens have a text of their own."""


def texts_for(tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[TextOrPair, ...]:
    """TEXTS, and texts that hold the tokens which the checkpoint added, as far as the model has
    embeddings for them.
    """
    added = [token for token, number in tokenizer.get_added_vocab().items() if number < rows]
    return (
        *TEXTS,
        *(f"a {token} in the middle,{token}and {token.upper()}" for token in added[:SPECIAL_TEXTS]),
    )


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """The classifier in fp32 as `from_pretrained` makes it of a folder, in the form of attention
    that transformers prefers.

    Of a checkpoint whose file has a wrapper's names, which transformers would take for none of the
    model's, it is made of the tensors.
    """
    config = read_config(checkpoint.directory, checkpoint.config)
    config.dtype = torch.float32
    try:
        with quiet():
            if checkpoint.renamed:
                kind = type(AutoModelForSequenceClassification.from_config(config))
                model = kind.from_pretrained(
                    None, config=config, state_dict=checkpoint.tensors, dtype=torch.float32
                )
            else:
                model = AutoModelForSequenceClassification.from_pretrained(
                    checkpoint.directory,
                    config=config,
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
    except (
        Exception
    ) as error:  # It was read once already; what fails now fails only for transformers itself.
        raise BadInput(
            f"{checkpoint.directory}: transformers cannot load it: {first_line(error)}"
        ) from None
    built: nn.Module = model.eval()
    return built


class Reference:
    """A torch classifier and its tokenizer, as transformers runs them."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, max_tokens: int
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.inputs = ("input_ids", "attention_mask", "token_type_ids")

    def in_bf16(self) -> Reference:
        """The same with weights and arithmetic in bf16, which torch has on every processor."""
        return Reference(
            copy.deepcopy(self.model).to(torch.bfloat16), self.tokenizer, self.max_tokens
        )

    @torch.no_grad()
    def logits(self, texts: Sequence[TextOrPair]) -> npt.NDArray[np.float32]:
        """Logits of each text run alone, (texts, labels)."""
        rows = []
        for text in texts:
            accepted = {name: torch.from_numpy(value) for name, value in self.encode(text).items()}
            try:
                rows.append(self.model(**accepted).logits[0].float().numpy())
            except (IndexError, RuntimeError) as error:
                tokens = accepted["input_ids"].shape[1]
                raise BadInput(
                    f"The checkpoint's own model cannot read a text of {tokens} tokens:"
                    f" {first_line(error)}"
                ) from None
        return np.stack(rows)

    def encode(self, text: TextOrPair) -> dict[str, npt.NDArray[np.int64]]:
        """What the model is given of a text, (1, L) each."""
        first, second = text if isinstance(text, tuple) else (text, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoded = self.tokenizer(
                first, second, truncation=True, max_length=self.max_tokens, return_tensors="np"
            )
        return {
            name: encoded[name].astype(np.int64)
            for name in self.inputs
            if name in encoded and self._takes(name)
        }

    def _takes(self, name: str) -> bool:
        # A tokenizer may number sentences for a model that has one type of them.
        if name == "token_type_ids" and getattr(self.model.config, "type_vocab_size", 2) < 2:
            return False
        return name in inspect.signature(self.model.forward).parameters
