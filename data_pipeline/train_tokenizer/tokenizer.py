"""A tokenizer as the stage leaves it: loaded, identified, and what its entries stand for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a stage's folder, set so that text never yields a special token.

    A document that holds the characters ``<|endoftext|>`` is encoded as these characters; to end a document,
    append `end_of_text` (tokenizer).

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"can't load the tokenizer {path}: {error}\nrun `llmill verify`") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that ends every document."""
    id = tokenizer.token_to_id(END_OF_TEXT)
    assert id is not None, f"the vocabulary lacks {END_OF_TEXT}"
    return int(id)


def token_bytes(folder: Path) -> NDArray[np.int32]:
    """UTF-8 bytes that each token id stands for, shape (vocab_size,); 0 for special tokens.

    Every character of a byte-level entry stands for one byte.
    """
    tokenizer = load_tokenizer(folder)
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, id in tokenizer.get_vocab().items():
        lengths[id] = len(token)
    lengths[list(tokenizer.get_added_tokens_decoder())] = 0
    return lengths


def special_tokens(folder: Path) -> list[str]:
    """The special tokens of a tokenizer, in the order of their ids.

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
