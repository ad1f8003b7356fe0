"""The tokenizers that llama.cpp has: which of them gives a tokenizer's ids, and what none of them does.

llama.cpp reads vocabulary and merges out of a GGUF file, but has the rules by which text is cut before merging in its
own source (``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``), under names of which the file says one. So ids are equal
where the rules of some name cut text as the tokenizer does. That is tried on texts in many scripts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.stage import PATTERNS, byte_level, split
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer

QWEN2 = PATTERNS["cl100k"].replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
"""Cuts words of Hindi, Thai, Tamil and others at no vowel sign or other mark, as no other one of llama.cpp's does."""
CUTS: dict[tuple[str, bool], tuple[str, ...]] = {
    ("gpt-2", False): (PATTERNS["gpt2"],),
    ("smollm", False): (r"\p{N}", PATTERNS["gpt2"]),
    ("dbrx", False): (PATTERNS["cl100k"],),
    ("llama-bpe", True): (PATTERNS["cl100k"],),
    ("qwen2", False): (QWEN2,),
    ("qwen35", False): (QWEN35,),
}
"""Regular expressions, one after the other, by llama.cpp's name for them and whether a word that is an entry is taken
whole, whatever the merges (``ignore_merges``). Those are left out that llama.cpp computes on a text in which
letters have no case and no script any more (``gpt-4o``, ``tekken``, ``deepseek-v3`` and others)."""
TRIALS = (
    "It's we'll I'VE they'D o'clock 'tis 'S don't're rock'n'roll",
    "camelCase HTTPServer iPhone éÉcole приветМир ΑΒγδ ǅungla ﬁne ßẞ",
    "हिन्दी में लिखा है, தமிழ் எழுத்து; ภาษาไทยไม่มีช่องว่าง বাংলা ကျွန်တော် ខ្មែរ",
    "中文没有空格，日本語のテキスト。한국어 텍스트! ㄅㄆㄇ ｶﾀｶﾅ 々〆",
    "العَرَبِيَّة، שָׁלוֹם עולם \u200f١٢٣٤ فارسی می\u200cخواهم",
    "1 12 123 1234 12345678901 3.14 ½ Ⅻ ²³ ① 1,000 १२३ ๑๒๓ 零一",
    "x  =  1\n\n\n   y\t\tz \r\n \r\n  \n end   ",
    "    leading\n",
    "a\u00a0b\u3000c\u2028d\x0be\u200bf\u00adg \u00a0 h \n\u3000\n i",
    "👩\u200d👩\u200d👧🙂🏽 🇩🇪 ✂️--- *** .../// </p>\n\n// ''' ??!!\n\n\n$1 #z @y",
    "e\u0301 cafe\u0301s n\u0303 A\u030a \u0301x o\u0302\u0323",
    "def f(self, __x=0x1F):\n\treturn x_1[0] != 'a'  # ok\n\n\nclass A2B:\r\n    pass",
    "\x00\x01\x7f\ufffd\ue000 \U0001f9ff\U00020000 a\x1cb",
)
"""Texts on which rules that differ cut differently."""


def require_reproducible(folder: Path) -> str:
    """See that llama.cpp can give the ids of the tokenizer in a folder, and return its name for how text is cut.

    Raises:
        UserError: it can't; what it lacks is said.
    """
    tokenizer = load_tokenizer(folder)
    if reason := next(obstacles(tokenizer), None):
        raise UserError(f"export.gguf: llama.cpp can't give the ids of this tokenizer: {reason}")
    description = json.loads(tokenizer.to_str())["model"]
    return choose_pre_tokenizer(tokenizer.pre_tokenizer, ignore_merges=bool(description.get("ignore_merges")))


def choose_pre_tokenizer(ours: pre_tokenizers.PreTokenizer, *, ignore_merges: bool) -> str:
    """Return llama.cpp's name for what cuts all of `TRIALS` as ``ours`` does.

    Args:
        ignore_merges: whether a word that is an entry is taken whole, whatever the merges.

    Raises:
        UserError: it has none.
    """
    wanted = [words(ours, text) for text in TRIALS]
    nearest = (len(TRIALS) + 1, "")
    for (name, whole), patterns in CUTS.items():
        if whole == ignore_merges:
            theirs = byte_level(*map(split, patterns))
            differing = sum(words(theirs, text) != one for text, one in zip(TRIALS, wanted, strict=True))
            nearest = min(nearest, (differing, name))
    differing, name = nearest
    if differing:
        raise UserError(
            f"export.gguf: llama.cpp has no rules that cut text as this tokenizer does ({name}, the nearest, "
            f"differ on {differing} of {len(TRIALS)} texts):\nleave it out, or train tokenizer and model with "
            "train_tokenizer.pattern=cl100k or gpt2 (docs/gguf.md has one for Hindi, Thai ...)"
        )
    return name


def words(cut: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    """Return the words into which a text is cut, a character for each byte."""
    return [word for word, _ in cut.pre_tokenize_str(text)]


def obstacles(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what a tokenizer does, apart from cutting text, that llama.cpp does not."""
    description = json.loads(tokenizer.to_str())
    model, normalizer = description["model"], description["normalizer"]
    if normalizer is not None:
        yield f"it normalises text ({normalizer['type']})"
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if model.get("unk_token") is not None and not alphabet <= model["vocab"].keys():
        yield f"bytes that its vocabulary lacks become {model['unk_token']}"
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) < len(vocabulary):
        yield "two entries of its vocabulary have the same id"
    yield from obstacles_of_added(description["added_tokens"])


def obstacles_of_added(added: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is done with added tokens, as a ``tokenizer.json`` has them, that llama.cpp does not.

    It looks for the longest one first, `tokenizers` for the first one in the text.
    """
    for token in added:
        if found := [rule for rule in ("lstrip", "rstrip", "single_word") if token[rule]]:
            yield f"its token {token['content']!r} is found by a rule of its own ({found[0]})"
    contents = [str(token["content"]) for token in added]
    begun: defaultdict[str, set[str]] = defaultdict(set)
    for one in contents:
        for length in range(1, len(one)):
            begun[one[:length]].add(one)
    for one in contents:
        for start in range(1, len(one)):
            for other in sorted(begun.get(one[start:], set()) - {one}):
                if len(set(one + other)) > 1:  # of runs of one character both find the longest
                    yield f"its tokens {one!r} and {other!r} may overlap in a text"
