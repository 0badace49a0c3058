"""
The reference: what transformers itself answers, with which every variant is compared.

It reads the checkpoint's folder as a user would (`AutoTokenizer`, and
`AutoModelForSequenceClassification` or `AutoModelForTokenClassification`). It shares nothing with
the graph: neither the placing of weights, nor the form of attention, nor the tokenization.
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
from transformers import PreTrainedTokenizerFast

from command import BadInput, first_line
from export.checkpoint.config import TOKEN_LABELS, auto_class, read_config
from export.checkpoint.loading import Checkpoint, embedding_rows, quiet

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
"""Texts of the parity test: short, long, too long, in other languages, cases and scripts, pairs,
and texts without words.
"""
PROBES = tuple(TEXTS[index] for index in (0, 1, 4, 7, 12, 13, 15))
"""Texts of the self-check at every start: one of each kind, and none that takes a slow processor a
second.
"""
MAX_ADDED_TOKEN_TEXTS = 24
"""Number of tokens added by a checkpoint that get a text of their own, at most."""


def texts_for(tokenizer: PreTrainedTokenizerFast, embedding_rows: int) -> tuple[TextOrPair, ...]:
    """Return TEXTS, and a text for each added token that the model has an embedding for."""
    vocabulary = tokenizer.get_added_vocab()
    added = [token for token, index in vocabulary.items() if index < embedding_rows]
    texts = [
        f"a {token} in the middle,{token}and {token.upper()}"
        for token in added[:MAX_ADDED_TOKEN_TEXTS]
    ]
    return (*TEXTS, *texts)


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Load the classifier in fp32 with `from_pretrained`, with transformers' preferred attention.

    If the file has a wrapper's names, transformers would not recognise them; the model is then
    built from the renamed tensors. Raises BadInput if transformers cannot load it.
    """
    config = read_config(checkpoint.directory, checkpoint.config)
    auto = auto_class(checkpoint.config)
    config.dtype = torch.float32
    try:
        with quiet():
            if checkpoint.renamed:
                kind = type(auto.from_config(config))
                model = kind.from_pretrained(
                    None, config=config, state_dict=checkpoint.tensors, dtype=torch.float32
                )
            else:
                model = auto.from_pretrained(
                    checkpoint.directory,
                    config=config,
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
    except Exception as error:
        # build_model has read the same files, so this failure is transformers' own, of any kind.
        raise BadInput(
            f"{checkpoint.directory}: transformers cannot load it: {first_line(error)}"
        ) from None
    classifier: nn.Module = model.eval()
    return classifier


class Reference:
    """A torch classifier and its tokenizer, as transformers runs them."""

    engine = "transformers"
    """What computes the answers."""
    can_emulate_bf16 = True
    """Whether `in_bf16` can be asked."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, max_tokens: int
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.inputs = ("input_ids", "attention_mask", "token_type_ids")
        self.embedding_rows = embedding_rows(model)
        self.labels_tokens = type(model).__name__.endswith(TOKEN_LABELS)

    def in_bf16(self) -> Reference:
        """Return a copy with weights and arithmetic in bf16, which torch has on any processor."""
        return Reference(
            copy.deepcopy(self.model).to(torch.bfloat16), self.tokenizer, self.max_tokens
        )

    @torch.no_grad()
    def logits(self, texts: Sequence[TextOrPair]) -> npt.NDArray[np.float32]:
        """Return the logits of each text run alone, (texts, labels).

        If the model labels tokens, they are those of all tokens of all texts, (tokens, labels).
        Raises BadInput if the model fails on a text.
        """
        rows = []
        for text in texts:
            inputs = self.encode(text)
            try:
                rows.append(self._answer(inputs))
            except (IndexError, RuntimeError) as error:
                tokens = inputs["input_ids"].shape[1]
                raise BadInput(
                    f"The model fails in {self.engine} on a text of {tokens} tokens:"
                    f" {first_line(error)}"
                ) from None
        return np.concatenate([np.atleast_2d(row) for row in rows])

    def _answer(self, inputs: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """Return the logits of one text, without its dimension."""
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        logits: npt.NDArray[np.float32] = self.model(**tensors).logits[0].float().numpy()
        return logits

    def encode(self, text: TextOrPair) -> dict[str, npt.NDArray[np.int64]]:
        """Return the model's inputs for a text, (1, L) each; a long text is truncated."""
        first, second = text if isinstance(text, tuple) else (text, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoded = self.tokenizer(
                first, second, truncation=True, max_length=self.max_tokens, return_tensors="np"
            )
        return {
            name: encoded[name].astype(np.int64)
            for name in self.inputs
            if name in encoded and self._accepts(name)
        }

    def _accepts(self, name: str) -> bool:
        # A tokenizer may give token types to a model that has a single one.
        if name == "token_type_ids" and getattr(self.model.config, "type_vocab_size", 2) < 2:
            return False
        return name in inspect.signature(self.model.forward).parameters
