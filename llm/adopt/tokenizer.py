"""Tokenizers that were made elsewhere: any byte-level BPE, as a ``tokenizer.json`` or as GPT-2's two files.

Its `tokenizer.json` is kept byte for byte where it can be, so that ids are those that the model was trained on. What
ends a document is found in what lies beside it, and written into ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import first_line
from data_pipeline.train_tokenizer.tokenizer import CONFIG, END_KEY, content_of, read_object, vocab_size
from llm.adopt.files import BESIDE, VOCABULARIES, Files

ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "<|end_of_document|>", "<eos>", "</s>")
"""Names of tokens that end documents, as makers of byte-level vocabularies call them."""
TURNS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|return|>",
)
"""Names of tokens that end a turn of a chat, which chat models have for their ``eos_token``."""
MAP = "special_tokens_map.json"
IN_UTF8 = frozenset({*range(0xC0), *range(0xC2, 0xF5)})
"""Bytes that texts consist of."""


@dataclass(frozen=True)
class Examined:
    """A tokenizer with what llmill needs to know of it."""

    tokenizer: Tokenizer
    end: str
    """The token that ends documents."""
    notes: tuple[str, ...]
    """Notes for a person: how the end was chosen, and what is lost of texts."""
    changed: bool
    """Whether it is another than the file's: made of two files, or with a token become a special one."""

    @property
    def size(self) -> int:
        """Number of ids."""
        return vocab_size(self.tokenizer)


def examine(files: Files, asked: str | None, path: Path) -> Examined:
    """Read a tokenizer, and find the token that ends documents.

    Args:
        asked: that token, where a person names it.
        path: what is adopted, as messages name it.

    Raises:
        UserError: it is damaged, no byte-level BPE, larger than the model beside it, or has no such token.
    """
    tokenizer = read(files)
    description = json.loads(tokenizer.to_str())
    require_byte_level(description, path)
    beside = {name: read_object(files[name]) for name in BESIDE if name in files and name.endswith(".json")}
    end, why = choose_end(tokenizer, beside, asked, path)
    notes = [f"{end} ends a document: {why}"]
    special = end in special_tokens(tokenizer)
    if not special:
        tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
        notes.append(f"{end} was an entry like others, and is a special token now")
    notes += remarks(description)
    if "config.json" in files:
        notes += compare_sizes(tokenizer, files["config.json"], path)
    return Examined(
        tokenizer=tokenizer,
        end=end,
        notes=tuple(notes),
        changed=not special or "tokenizer.json" not in files,
    )


def read(files: Files) -> Tokenizer:
    """Read a ``tokenizer.json``, or make one of GPT-2's two files.

    Raises:
        UserError: they are damaged.
    """
    if "tokenizer.json" in files:
        path = files["tokenizer.json"]
        require_model(read_object(path), path)
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path} can't be read: {first_line(error)}") from None
    entries, merges = next(pair for pair in VOCABULARIES if pair[0] in files)
    read_object(files[entries])
    try:
        model = models.BPE.from_file(str(files[entries]), str(files[merges]))
    except Exception as error:  # as above
        raise UserError(
            f"{files[entries].parent}: {entries} and {merges} can't be read: {first_line(error)}"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def require_model(description: Mapping[str, Any], path: Path) -> None:
    """See that a ``tokenizer.json`` holds a BPE.

    Raises:
        UserError: it holds none, or that of SentencePiece.
    """
    model = description.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{path} describes no tokenizer: it has no model with a vocabulary")
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE" or model.get("byte_fallback"):
        named = "SentencePiece's BPE, with ByteFallback" if kind == "BPE" else kind
        raise UserError(
            f"{path} is of the kind {named}:\nllmill reads byte-level BPE only (GPT-2's, Llama 3's, Qwen's)"
        )


def require_byte_level(description: Mapping[str, Any], path: Path) -> None:
    """See that a BPE cuts texts into bytes, always in the same way.

    Raises:
        UserError: it does not.
    """
    model = description["model"]
    steps = list(steps_of(description["pre_tokenizer"]))
    if "ByteLevel" not in [step["type"] for step in steps]:
        raise UserError(
            f"{path} holds a BPE over characters: its pre_tokenizer has no ByteLevel;\nllmill reads byte-level BPE only"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(
                f"{path} has model.{name} = {model[name]!r}:\nremove it from tokenizer.json, if ids are right without"
            )


def steps_of(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, those in sequences one by one."""
    if component is None:
        return
    held = component.get("pretokenizers") or component.get("normalizers")
    if held is None:
        yield component
    for one in held or ():
        yield from steps_of(one)


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens of a tokenizer, in the order of their ids."""
    added = tokenizer.get_added_tokens_decoder()
    return [token.content for _, token in sorted(added.items()) if token.special]


def choose_end(
    tokenizer: Tokenizer, beside: Mapping[str, Mapping[str, Any]], asked: str | None, path: Path
) -> tuple[str, str]:
    """Choose the token that ends documents, and return why.

    That of a chat model's ``eos_token`` ends a turn; where the vocabulary also has one that ends documents, as it had
    for pretraining, that one is taken.

    Raises:
        UserError: there is none, or not the one that was asked for.
    """
    specials = special_tokens(tokenizer)
    there = ", ".join(specials[:8]) or "no special tokens at all"
    if asked is not None:
        if tokenizer.token_to_id(asked) is None:
            raise UserError(
                f"{path}: the vocabulary has no {asked}:\nset adopt.end_of_text to one of {there}"
            )
        return asked, "as adopt.end_of_text says"
    kept = content_of(beside.get(CONFIG, {}).get(END_KEY))
    if kept and tokenizer.token_to_id(kept) is not None:
        return kept, f"{CONFIG} names it"
    named = [(content_of(one.get("eos_token")), name) for name, one in beside.items()]
    found = [(token, name) for token, name in named if token and tokenizer.token_to_id(token) is not None]
    known = next((end for end in ENDS if tokenizer.token_to_id(end) is not None), None)
    if found and not (found[0][0] in TURNS and known):
        return str(found[0][0]), f"it is the eos_token of {found[0][1]}"
    if known:
        more = f", and {found[0][0]}, the eos_token, ends a turn" if found else ""
        return known, f"its name says so{more} (adopt.end_of_text names another)"
    if turn := next((one for one in TURNS if one in specials), None):
        return (
            turn,
            "it ends a turn, and the vocabulary has none for documents (adopt.end_of_text names another)",
        )
    raise UserError(f"{path}: no token is known to end a text:\nset adopt.end_of_text to one of {there}")


def remarks(description: Mapping[str, Any]) -> list[str]:
    """Return what becomes of texts that the tokenizer does not give back as they were."""
    notes = []
    kinds = [step["type"] for step in steps_of(description["normalizer"])]
    if kinds:
        notes.append(
            f"it normalises texts ({', '.join(kinds)}): bytes, as in bits per byte, are those of the normalised text"
        )
    if any(step.get("add_prefix_space") for step in steps_of(description["pre_tokenizer"])):
        notes.append("it puts a space before a text that begins with none")
    alphabet = dict(zip(sorted_bytes(), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    lost = [byte for byte in sorted(IN_UTF8) if alphabet[byte] not in description["model"]["vocab"]]
    if lost:
        some = ", ".join(f"{byte:#04x}" for byte in lost[:4])
        notes.append(
            f"its vocabulary lacks {len(lost)} of the bytes that texts may have ({some} ...): they are left out"
        )
    return notes


def sorted_bytes() -> list[int]:
    """Return the bytes in the order of the characters that stand for them: first those that are printed as
    themselves."""
    printed = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    return [*printed, *(byte for byte in range(256) if byte not in printed)]


def compare_sizes(tokenizer: Tokenizer, config: Path, path: Path) -> list[str]:
    """Compare the vocabularies of a tokenizer and of the model beside it.

    Raises:
        UserError: the model has fewer entries, or it can't be known how many.
    """
    rows, ids = read_object(config).get("vocab_size"), vocab_size(tokenizer)
    if not isinstance(rows, int):
        raise UserError(f"{config} has no vocab_size")
    if ids > rows:
        raise UserError(
            f"{path}: its tokenizer has {ids:,} entries, its model {rows:,}:\nit is not the model's own tokenizer"
        )
    return (
        [f"the model has {rows - ids:,} more entries than the tokenizer, which no text yields"]
        if rows > ids
        else []
    )


def write(examined: Examined, files: Files, out: Path) -> None:
    """Write the folder that `load_tokenizer` and `transformers.AutoTokenizer` load."""
    beside: dict[str, Any] = (
        read_object(files[CONFIG]) if CONFIG in files else {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    eos = {} if content_of(beside.get("eos_token")) else {"eos_token": examined.end}
    config = {**beside, **eos, END_KEY: examined.end}
    with atomic_path(out / CONFIG) as temporary:
        temporary.write_text(
            json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    copy({name: files[name] for name in BESIDE if name in files and name != CONFIG}, out)
    if not examined.changed:
        copy({"tokenizer.json": files["tokenizer.json"]}, out)
        return
    with atomic_path(out / "tokenizer.json") as temporary:
        examined.tokenizer.save(str(temporary), pretty=True)


def copy(files: Files, out: Path) -> None:
    """Copy files under their names, each whole or not at all; those that are there stay."""
    for name, path in files.items():
        if not (out / name).exists():
            with atomic_path(out / name) as temporary:
                shutil.copyfile(path, temporary)
