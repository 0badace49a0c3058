"""
A checkpoint's tokenizer as transformers makes it: of all its files, not of tokenizer.json alone.

`tokenizer_config.json` overrides what stands in `tokenizer.json` (case, accents, the space before
the first word), and tokens may stand in `added_tokens.json` or `added_tokens_decoder` only. Code of
a checkpoint's own is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from command import BadInput, Unavailable, first_line

# What older trainers leave instead of tokenizer.json: WordPiece, byte-level BPE, SentencePiece.
SLOW_TOKENIZERS = (
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
)
# What transformers 5 calls a tokenizer that is its tokenizer.json and nothing else.
PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
# Whose tokenizers give types of sentences in transformers 4 and none in 5, which notes its
# `backend` where it has saved one.
WITHOUT_TYPES_IN_5 = ("AlbertTokenizer", "RemBertTokenizer")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `AutoTokenizer` makes of a checkpoint's files.

    Unavailable if a package is missing that converts it, BadInput if it cannot be read, has no fast
    form, or is code of its own.
    """
    own = directory / "tokenizer.json"
    if own.is_file():
        try:
            Tokenizer.from_file(str(own))
        except Exception as error:  # tokenizers raises nothing narrower.
            raise BadInput(f"{own} cannot be read: {first_line(error)}") from None
    described = read_tokenizer_config(directory)
    more: dict[str, Any] = {}
    if isinstance(extra := described.get("extra_special_tokens"), list):
        # transformers 5 writes the list that 4 calls additional_special_tokens, and 4 reads a
        # dictionary under this name.
        more = {"additional_special_tokens": extra, "extra_special_tokens": {}}
    if "AutoTokenizer" in (described.get("auto_map") or {}):
        raise BadInput(
            f"{directory / 'tokenizer_config.json'} names a tokenizer that is code of the"
            " checkpoint's own (auto_map), which is never run; save it as a"
            " PreTrainedTokenizerFast, whose tokenizer.json says all of it."
        )
    kind = (
        PreTrainedTokenizerFast
        if described.get("tokenizer_class") in PLAIN and own.is_file()
        else AutoTokenizer
    )
    try:
        made = kind.from_pretrained(
            directory,
            local_files_only=True,
            **more,
            **(
                {}
                if kind is PreTrainedTokenizerFast
                else {"use_fast": True, "trust_remote_code": False}
            ),
        )
    except ImportError as error:
        raise Unavailable(
            f"{directory}: its tokenizer has to be converted, and that takes another package:"
            f" {first_line(error)}"
        ) from None
    except Exception as error:  # A tokenizer may be wrong in as many ways as there are tokenizers.
        what = (
            "its tokenizer cannot be made"
            if own.is_file()
            else "it has no tokenizer.json, and none can be made of its vocabulary"
        )
        raise BadInput(f"{directory}: {what}: {first_line(error)}") from None
    if not isinstance(made, PreTrainedTokenizerFast):
        raise BadInput(
            f"{directory}: its tokenizer ({type(made).__name__}) is written in Python and has no"
            " fast form, so no tokenizer.json can stand for it; train the model with a fast"
            " tokenizer."
        )
    if (
        described.get("backend") == "tokenizers"
        and "model_input_names" not in described
        and described.get("tokenizer_class") in WITHOUT_TYPES_IN_5
    ):
        made.model_input_names = ["input_ids", "attention_mask"]
    if not own.is_file():
        print(
            f"{directory} has no tokenizer.json: made one of its vocabulary"
            f" ({type(made).__name__}).",
            flush=True,
        )
    return made


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says; empty where there is none."""
    path = directory / "tokenizer_config.json"
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from None
    if not isinstance(described, dict):
        raise BadInput(f"{path} is no JSON object.")
    return described


def write_tokenizer(
    tokenizer: PreTrainedTokenizerFast, directory: Path, rows: int, target: Path
) -> None:
    """Writes the tokenizer as one file for the service.

    BadInput if it knows a token that has none of the `rows` of the model's embeddings. Special
    tokens that its class adds by itself, as `[MASK]`, are left out in that case: no text that the
    model was trained with holds them.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    written = _tokens_in_files(directory)
    kept = []
    for token in whole.get("added_tokens", []):
        if token["id"] >= rows and token["content"] not in written and token["special"]:
            print(
                f"{directory}: leaves out {token['content']!r}, which {type(tokenizer).__name__}"
                " adds and the model has no embedding for.",
                flush=True,
            )
        else:
            kept.append(token)
    whole["added_tokens"] = kept
    if "token_type_ids" not in tokenizer.model_input_names:
        # The checkpoint's tokenizer gives no types, so its model takes the first for both halves of
        # a pair.
        _of_the_first_type(whole.get("post_processor"))
    made = Tokenizer.from_str(json.dumps(whole))
    token, number = max(made.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise BadInput(
            f"{directory}: its tokenizer knows {token!r} as number {number}, and the embeddings"
            f" have {rows} rows, numbers 0 to {rows - 1}; call"
            " model.resize_token_embeddings(len(tokenizer)), train it, and save both."
        )
    made.save(str(target))


def _of_the_first_type(part: Any) -> None:
    """Sets every type of a post-processor's template to the first."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "type_id":
                part[key] = 0
            else:
                _of_the_first_type(value)
    elif isinstance(part, list):
        for one in part:
            _of_the_first_type(one)


def _tokens_in_files(directory: Path) -> set[str]:
    """The tokens that the checkpoint's own files add, whichever of them does."""
    found: set[str] = set()
    own = directory / "tokenizer.json"
    if own.is_file():
        found |= set(Tokenizer.from_file(str(own)).get_vocab())
    for name in ("added_tokens.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            described = _read_object(directory / name)
            found |= set(
                _strings(
                    described.values() if name == "special_tokens_map.json" else described.keys()
                )
            )
    config = read_tokenizer_config(directory)
    return found | set(
        _strings(
            [
                config.get("added_tokens_decoder"),
                config.get("additional_special_tokens"),
                config.get("extra_special_tokens"),
            ]
        )
    )


def _strings(values: Any) -> list[str]:
    """Tokens among strings, objects with a content, and lists of either."""
    found: list[str] = []
    for value in values:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            found += [value["content"]] if "content" in value else _strings(value.values())
        elif isinstance(value, list):
            found += _strings(value)
    return found
