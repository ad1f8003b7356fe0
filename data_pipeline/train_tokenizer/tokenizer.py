"""A tokenizer as the stage leaves it: loaded, identified, and what its entries stand for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256
from data_pipeline.core.text import first_line

END_OF_TEXT = "<|endoftext|>"
"""Return the token that ends documents in the vocabularies that we learn."""
CONFIG = "tokenizer_config.json"
END_KEY = "end_of_text"
"""Names the token that ends documents in `CONFIG`, where that is another one than its ``eos_token``: chat models end
their turns with that."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a stage's folder, set so that text never yields a special token.

    A document that holds the characters ``<|endoftext|>`` is encoded as these characters; to end a document,
    append `end_of_text` (tokenizer). Nothing is put around a text, and none is cut or padded, whatever the file sets.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"can't load the tokenizer {path}: {error}\nrun `llmill verify`") from error
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.end_of_text = end_token(folder)  # type: ignore[attr-defined]  # it keeps what it is given
    return tokenizer


def end_token(folder: Path) -> str:
    """Return the token that ends documents, as the tokenizer's folder names it; `END_OF_TEXT` where it names none.

    Raises:
        UserError: the file that names it is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        return END_OF_TEXT
    config = read_object(path)
    return content_of(config.get(END_KEY)) or content_of(config.get("eos_token")) or END_OF_TEXT


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def content_of(token: Any) -> str | None:
    """Return the characters of a special token, which older files describe in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends every document; ``tokenizer`` comes from `load_tokenizer`."""
    id = tokenizer.token_to_id(end_of(tokenizer))
    assert id is not None, f"the vocabulary lacks {end_of(tokenizer)}"
    return int(id)


def end_of(tokenizer: Tokenizer) -> str:
    """Return the token that ends every document; ``tokenizer`` comes from `load_tokenizer`."""
    return str(tokenizer.end_of_text)  # type: ignore[attr-defined]


def vocab_size(tokenizer: Tokenizer) -> int:
    """Count how many ids there are, those included that some vocabularies leave out between others."""
    return 1 + max(tokenizer.get_vocab().values())


def token_bytes(folder: Path) -> NDArray[np.int32]:
    """UTF-8 bytes that each token id stands for, shape (vocab_size,); 0 for special tokens.

    Every character of a byte-level entry stands for one byte; added tokens that are no special ones are text.
    """
    tokenizer = load_tokenizer(folder)
    lengths = np.zeros(vocab_size(tokenizer), np.int32)
    for token, id in tokenizer.get_vocab().items():
        lengths[id] = len(token)
    for id, added in tokenizer.get_added_tokens_decoder().items():
        lengths[id] = 0 if added.special else len(added.content.encode())
    return lengths


def special_tokens(folder: Path) -> list[str]:
    """Return the special tokens of a tokenizer, in the order of their ids.

    Raises:
        UserError: there is none, or it can't be read.
    """
    added = load_tokenizer(folder).get_added_tokens_decoder()
    return [token.content for _, token in sorted(added.items()) if token.special]


def behaviour_sha256(folder: Path) -> str:
    """Hash of what a tokenizer does: into which ids it cuts a text, and which tokens are special.

    Not of its file's bytes: `transformers` writes the same tokenizer in other ways. How it pads, truncates and decodes,
    and what it puts around a text, is left out: here each is done by who uses it.

    Raises:
        UserError: there is none, or it can't be read.
    """
    described = json.loads(load_tokenizer(folder).to_str())
    added = [
        [token["id"], token["content"], token["special"]] if token["special"] else token
        for token in sorted(described["added_tokens"], key=lambda token: token["id"])
    ]
    does = {name: described[name] for name in ("normalizer", "pre_tokenizer", "model")}
    text = json.dumps({**does, "added_tokens": added}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(folder: Path) -> str:
    """Hash of ``tokenizer.json``: token shards and models carry it, so that a mix-up is noticed."""
    return file_sha256(folder / "tokenizer.json")
