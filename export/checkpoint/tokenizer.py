"""
Loads a checkpoint's tokenizer as transformers does: from all its files, not tokenizer.json alone.

`tokenizer_config.json` overrides settings of `tokenizer.json` (case, accents, the space before the
first word), and some tokens are only in `added_tokens.json` or `added_tokens_decoder`. Code of a
checkpoint's own is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from command import BadInput, Unavailable, first_line

# Files that older trainers write instead of tokenizer.json: WordPiece, byte-level BPE,
# SentencePiece.
SLOW_TOKENIZERS = (
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
)
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Class names of a tokenizer that is its tokenizer.json and nothing else."""
CLASSES_WITHOUT_TYPES_IN_5 = ("AlbertTokenizer", "RemBertTokenizer")
"""Class names of tokenizers that give token types in transformers 4 but not in 5. A checkpoint that
transformers 5 saved has a `backend` in its tokenizer_config.json.
"""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `AutoTokenizer` builds from a checkpoint's files.

    Raises Unavailable if a package that converts it is missing. Raises BadInput if it cannot be
    read, has no fast form, or requires code of its own.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower.
            raise BadInput(f"{path} cannot be read: {first_line(error)}") from None
    config = read_tokenizer_config(directory)
    if "AutoTokenizer" in (config.get("auto_map") or {}):
        raise BadInput(
            f"{directory / 'tokenizer_config.json'} requires code of the checkpoint's own"
            " (auto_map), which is never run; save the tokenizer as a PreTrainedTokenizerFast,"
            " which is complete in tokenizer.json."
        )
    tokenizer = _from_pretrained(directory, config)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadInput(
            f"{directory}: its tokenizer ({type(tokenizer).__name__}) is written in Python and has"
            " no fast form, so it cannot be saved as tokenizer.json; train the model with a fast"
            " tokenizer."
        )
    if (
        config.get("backend") == "tokenizers"
        and "model_input_names" not in config
        and config.get("tokenizer_class") in CLASSES_WITHOUT_TYPES_IN_5
    ):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if not path.is_file():
        print(
            f"{directory} has no tokenizer.json: built one from its vocabulary"
            f" ({type(tokenizer).__name__}).",
            flush=True,
        )
    return tokenizer


def _from_pretrained(directory: Path, config: dict[str, Any]) -> Any:
    """Return what transformers builds from the files, fast or not."""
    has_json = (directory / "tokenizer.json").is_file()
    options: dict[str, Any] = {"local_files_only": True}
    if isinstance(extra := config.get("extra_special_tokens"), list):
        # transformers 5 writes the list that 4 calls additional_special_tokens, and 4 reads a
        # dictionary under this name.
        options |= {"additional_special_tokens": extra, "extra_special_tokens": {}}
    try:
        if has_json and config.get("tokenizer_class") in PLAIN_CLASSES:
            return PreTrainedTokenizerFast.from_pretrained(directory, **options)
        return AutoTokenizer.from_pretrained(
            directory, use_fast=True, trust_remote_code=False, **options
        )
    except ImportError as error:
        raise Unavailable(
            f"{directory}: its tokenizer must be converted, which needs another package:"
            f" {first_line(error)}"
        ) from None
    except Exception as error:  # The code of any tokenizer may raise anything for wrong files.
        problem = (
            "its tokenizer cannot be loaded"
            if has_json
            else "it has no tokenizer.json, and none can be built from its vocabulary"
        )
        raise BadInput(f"{directory}: {problem}: {first_line(error)}") from None


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return the fields of `tokenizer_config.json`; empty if there is no such file."""
    path = directory / "tokenizer_config.json"
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise BadInput(f"{path} is not a JSON object; save the tokenizer with save_pretrained.")
    return fields


def write_tokenizer(
    tokenizer: PreTrainedTokenizerFast, directory: Path, embedding_rows: int, target: Path
) -> None:
    """Write the tokenizer as one tokenizer.json for the service.

    Raises BadInput if a token has no embedding, that is, an id of `embedding_rows` or more. Special
    tokens that its class adds by itself, such as `[MASK]`, are left out in that case: no text that
    the model was trained with holds them.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    saved_tokens = _tokens_in_files(directory)
    added_tokens = []
    for token in fields.get("added_tokens", []):
        content = token["content"]
        if token["id"] >= embedding_rows and content not in saved_tokens and token["special"]:
            print(
                f"{directory}: leaves out {content!r}, which {type(tokenizer).__name__} adds and"
                " the model has no embedding for.",
                flush=True,
            )
        else:
            added_tokens.append(token)
    fields["added_tokens"] = added_tokens
    if "token_type_ids" not in tokenizer.model_input_names:
        # The checkpoint's tokenizer gives no types, so its model uses the first type for both
        # halves of a pair.
        _set_first_type(fields.get("post_processor"))
    complete = Tokenizer.from_str(json.dumps(fields))
    token, index = max(complete.get_vocab().items(), key=lambda item: item[1])
    if index >= embedding_rows:
        raise BadInput(
            f"{directory}: its tokenizer has the token {token!r} with id {index}, but the model has"
            f" embeddings for ids 0 to {embedding_rows - 1} only; call"
            " model.resize_token_embeddings(len(tokenizer)), train the model, and save both."
        )
    complete.save(str(target))


def _set_first_type(node: Any) -> None:
    """Set every token type in a post-processor's template to 0, in place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "type_id":
                node[key] = 0
            else:
                _set_first_type(value)
    elif isinstance(node, list):
        for child in node:
            _set_first_type(child)


def _tokens_in_files(directory: Path) -> set[str]:
    """Return the tokens that any of the checkpoint's files lists."""
    tokens: set[str] = set()
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file():
        tokens |= set(Tokenizer.from_file(str(tokenizer)).get_vocab())
    added = directory / "added_tokens.json"
    if added.is_file():
        tokens |= _read_object(added).keys()
    special = directory / "special_tokens_map.json"
    if special.is_file():
        tokens |= set(_strings(_read_object(special).values()))
    config = read_tokenizer_config(directory)
    fields = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    return tokens | set(_strings(config.get(field) for field in fields))


def _strings(values: Iterable[Any]) -> list[str]:
    """Return the tokens among strings, objects with a content, and lists of either."""
    tokens: list[str] = []
    for value in values:
        if isinstance(value, str):
            tokens.append(value)
        elif isinstance(value, dict):
            tokens += [value["content"]] if "content" in value else _strings(value.values())
        elif isinstance(value, list):
            tokens += _strings(value)
    return tokens
