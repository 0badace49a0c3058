"""Truncation equals that of the tokenizers library.

Long texts are cut before they are tokenized, and get the same tokens.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from service.artifact import Artifact, read_artifact
from service.classifier import Classifier
from service.runtimes import Runtime
from service.runtimes.auto import choose, load
from service.tokenization.truncation import Side, longest_first
from tests.factories import write_artifact

CORPUS = [
    "a charming and often affecting journey",
    "the plot is thin, the actors aren't!",
    "don't  mix   spaces\tand\ntabs",
    "Ünïcödé çafé naïve",
    "电影很好看 但是太长",
    "映画はとても長い",
    "1234 56.78 $9.99",
    "🎬 👍🏽 👩‍👩‍👧 🇫🇷🇩🇪",
    "[SEP] (a) [b] {c} -- ...",
    "Ⅻ ﬁn ½ ﷺ",
] * 3
ALPHABET = [
    *"abcdeé é ü ñ İ ß 电影很好看長 はとで 가각 .,!?'’-–()[]{}\"#@ 0123456789 ½ﬁﷺⅫ 🎬👍🏽🇫🇷"
    " ́̈\u200d\u0600\u00a0\u3000\u2028\u0085\ufeff\x00\x1c\t\n\r",
    " ",
    " ",
    " ",
    "  ",
    "\n\n",
    "   \n ",
    "the ",
    "and ",
    "often ",
    "charming ",
    "don't ",
    "[SEP]",
    "[MASK]",
    "<mask> ",
    "``",
    "--",
    "aaaaaaaaaa",
    "a" * 99 + " ",
    "b" * 300,
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTHS = (5, 15, 16)


def framed(tokenizer: Tokenizer, frame: str) -> Tokenizer:
    first, last = (
        ("[CLS]", tokenizer.token_to_id("[CLS]")),
        ("[SEP]", tokenizer.token_to_id("[SEP]")),
    )
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[first, last]
    )
    tokenizer.post_processor = {
        "template": template,
        "deberta": processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[first, last],
        ),
        "bert": processors.BertProcessing(last, first),
        "roberta": processors.RobertaProcessing(last, first),
        "end only": processors.TemplateProcessing(
            single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[last]
        ),
        "none": None,
        "bytes": processors.Sequence([processors.ByteLevel(trim_offsets=True), template]),
    }[frame]
    return tokenizer


FRAMES = ("template", "deberta", "bert", "roberta", "end only", "none", "bytes")


def word_pieces(**normalizer: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    )
    return tokenizer


def byte_pairs(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigrams(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, unk_token="[UNK]", special_tokens=SPECIAL, show_progress=False
        ),
    )
    return tokenizer


def with_masks(tokenizer: Tokenizer) -> Tokenizer:
    """Add tokens that absorb the white space next to them, as RoBERTa's mask does."""
    tokenizer.add_special_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("<right>", rstrip=True)]
    )
    tokenizer.add_tokens(
        [AddedToken("often", single_word=True), AddedToken("--", normalized=True), AddedToken("aa")]
    )
    return tokenizer


def charsmap() -> bytes:
    """Return SentencePiece's normalization as exported tokenizers contain it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=160,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated
    proto.ParseFromString(model.getvalue())
    charsmap_bytes: bytes = proto.normalizer_spec.precompiled_charsmap
    return charsmap_bytes


COLLAPSED = normalizers.Sequence(
    [
        normalizers.Nmt(),
        normalizers.NFKC(),
        normalizers.Strip(),
        normalizers.Replace("``", '"'),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
)
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bert": word_pieces,
    "bert cased": lambda: word_pieces(lowercase=False, strip_accents=False),
    "bert without Chinese": lambda: word_pieces(handle_chinese_chars=False, clean_text=False),
    "bert with masks": lambda: with_masks(word_pieces()),
    "roberta": lambda: byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta with masks": lambda: with_masks(
        byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=True))
    ),
    "modernbert": lambda: byte_pairs(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()
    ),
    "bpe by words": lambda: byte_pairs(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Whitespace(),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(use_regex=False),
            ]
        )
    ),
    "camembert": lambda: unigrams(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        COLLAPSED,
    ),
    "with a charsmap": lambda: unigrams(
        pre_tokenizers.Metaspace(),
        normalizers.Sequence(
            [
                normalizers.Precompiled(charsmap()),
                normalizers.Strip(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        ),
    ),
    "xlm-roberta": lambda: unigrams(pre_tokenizers.Metaspace(), COLLAPSED),
    "deberta-v3": lambda: unigrams(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizers.Sequence(
            [
                normalizers.Strip(),
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
            ]
        ),
    ),
    "unigram with punctuation": lambda: with_masks(
        unigrams(
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
        )
    ),
}


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_artifact(tmp_path_factory.mktemp("artifact") / "reviews")


@functools.cache
def runtime_of(folder: Path) -> Runtime:
    artifact = read_artifact(folder)
    return load(artifact, choose(artifact), 1)


def classifier_of(artifact: Artifact, tokenizer: Tokenizer, max_tokens: int) -> Classifier:
    """A classifier with that tokenizer; its engine is there because it must have one, and is never
    asked.
    """
    runtime = runtime_of(artifact.directory)
    changed = Artifact(
        artifact.directory.parent, artifact.manifest.model_copy(update={"max_tokens": max_tokens})
    )
    tokenizer.save(str(changed.path("tokenizer.json")))
    return Classifier(changed, runtime)


def reference(
    tokenizer: Tokenizer, max_tokens: int, side: str
) -> Callable[..., tuple[list[int], list[int], bool]]:
    """What tokenizers itself makes of a text or a pair; what has no tokens at all is one of padding
    to us.
    """
    library = Tokenizer.from_str(tokenizer.to_str())
    library.enable_truncation(max_tokens, strategy="longest_first", direction=side)

    def cut(text: str, pair: str | None = None) -> tuple[list[int], list[int], bool]:
        encoding = library.encode(text, pair)
        return encoding.ids or [0], encoding.type_ids or [0], bool(encoding.overflowing)

    return cut


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "roberta with masks", "xlm-roberta"], indirect=True)
def test_texts_and_pairs_are_truncated_as_by_the_tokenizers_library(
    kind: Tokenizer, frame: str, side: Any, artifact: Artifact
) -> None:
    tokenizer = framed(kind, frame)
    draw = random.Random(frame)
    # Short texts, because tokenizers pairs every part that it cuts off with every other.
    letters = [letter for letter in ALPHABET if len(letter) < 20]
    texts = ["".join(draw.choices(letters, k=draw.choice((0, 1, 4, 12)))) for _ in range(40)]
    for max_tokens in LENGTHS:
        classifier, cut = (
            classifier_of(artifact, tokenizer, max_tokens),
            reference(tokenizer, max_tokens, side),
        )
        longer = classifier_of(artifact, tokenizer, max(LENGTHS) + 8)
        for text, pair in zip(texts, [*[None] * 10, *texts[:9:-1]], strict=True):
            for release_gil in (False, True):
                for encoded in (
                    classifier.encode(text, pair, side, release_gil),
                    longer.encode(text, pair, side, release_gil, max_tokens),
                ):
                    assert (list(encoded.ids), list(encoded.type_ids), encoded.truncated) == cut(
                        text, pair
                    ), (max_tokens, text, pair)


@pytest.mark.parametrize("room", range(8))
def test_pairs_are_truncated_by_the_librarys_rule_for_every_length(room: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(room)
    for first in range(12):
        for second in range(12):
            encoded = tokenizer.encode("a " * first, "b " * second)
            assert longest_first(first, second, room) == (
                encoded.ids.count(0),
                encoded.ids.count(1),
            ), (
                first,
                second,
            )


def long_texts(draw: random.Random, count: int) -> Iterator[str]:
    """Texts that are much longer than what a model reads, of all the alphabet or of a few
    characters of it.
    """
    for number in range(count):
        letters = draw.sample(ALPHABET, k=draw.choice((1, 2, 3, 6, 20))) + [" "] * (number % 3)
        yield draw.choice(("", " ", "\n  ")) + "".join(draw.choices(letters, k=3_000))[:6_000]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_has_the_same_tokens_as_tokenized_whole(
    kind: Tokenizer, side: Any, artifact: Artifact
) -> None:
    tokenizer = framed(kind, "template")
    classifier, longer, cut = (
        classifier_of(artifact, tokenizer, 16),
        classifier_of(artifact, tokenizer, 40),
        reference(tokenizer, 16, side),
    )
    shortened = 0
    for text in long_texts(random.Random(side), 60):
        part = classifier._tokens_of_part(text, 15, side)
        if part is not None:
            shortened += 1
            whole = tokenizer.encode(text, add_special_tokens=False).ids
            assert part == (
                whole[: len(part)] if side == "right" else whole[len(whole) - len(part) :]
            ), text
        for encoded in (
            classifier.encode(text, None, side, True),
            longer.encode(text, None, side, True, 16),
        ):
            assert (list(encoded.ids), list(encoded.type_ids), encoded.truncated) == cut(text), text
    assert shortened > 10


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(min_size=20, max_size=200), repeats=st.integers(10, 60))
def test_any_long_text_has_the_same_tokens_as_tokenized_whole(
    kind: Tokenizer, artifact: Artifact, text: str, repeats: int
) -> None:
    tokenizer, text = framed(kind, "template"), " ".join([text] * repeats)
    classifier = classifier_of(artifact, tokenizer, 16)
    sides: tuple[Side, Side] = ("right", "left")
    for side in sides:
        encoded = classifier.encode(text, None, side, True)
        assert (list(encoded.ids), list(encoded.type_ids), encoded.truncated) == reference(
            tokenizer, 16, side
        )(text)
