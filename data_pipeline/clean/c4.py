"""The rules of C4: lines that are no sentences go, and documents that are no prose are dropped.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 21(140),
section 2.2. Where the text is silent, what its code does (tensorflow_datasets, c4_utils.py) decides: a line that ends
with ``...`` is cut short and goes; so does one with a word of over 1000 characters. Its list of bad words is a phrase
list (see `data_pipeline.clean.blocklists`), its three-sentence spans are a matter for deduplication. Ours differ so:
"lorem ipsum" and curly brackets are sought in the whole document and not only in lines that would stay; blank lines
between lines that stay are kept, one at most, as paragraphs are worth keeping; and sentences are counted by a plain
rule (`count_sentences`) in place of NLTK's trained one. Words are those of `data_pipeline.core.words`, and sentences
end as they do in each script (`data_pipeline.clean.sentences`). A line is a paragraph on the web; books with wrapped
lines would lose most of theirs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.clean.quality import Broken, Count
from data_pipeline.clean.sentences import ASCII_ENDS, CLOSING_QUOTES, OTHER_ENDS, unended_letters
from data_pipeline.clean.text_columns import from_buffers, replace_rows
from data_pipeline.core.config import Config
from data_pipeline.core.kernels import code_point, kernel
from data_pipeline.core.words import MARK, TABLE_SIZE, character_classes
from data_pipeline.core.words import UNSPACED as WORD_UNSPACED
from data_pipeline.documents import buffers

CITATIONS = r"\[\d*\]|\[edit\]|\[citation needed\]"
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
PHRASES = "(?i)javascript|" + "|".join(POLICIES)
LINE_REASONS = ("long_word", "no_terminal_mark", "few_words", "javascript", "policy")
LONG_WORD, NO_TERMINAL_MARK, FEW_WORDS, JAVASCRIPT, POLICY = range(5)

SPACE, WORD, TERMINAL, END, OTHER_END, CLOSER, UNSPACED, UNENDED = (np.uint8(1 << bit) for bit in range(8))


class C4Rules(Config):
    """Which rules apply; None or false switches one off."""

    remove_citations: bool = True
    """``[1]``, ``[]``, ``[edit]`` and ``[citation needed]``, as in Wikipedia."""
    terminal_mark: bool = True
    """Remove lines that don't end with a full stop, question mark, exclamation mark or end quotation mark, of whatever
    script; lines that end in Thai or Lao, which have none, stay."""
    min_words_per_line: Count | None = 5
    """Remove lines of fewer words."""
    max_word_length: Count | None = 1000
    """Remove lines with a longer word (in characters)."""
    javascript: bool = True
    """Remove lines that mention JavaScript."""
    policy: bool = True
    """Remove lines that speak of terms of use, privacy or cookies."""
    lorem_ipsum: bool = True
    """Drop documents with this placeholder."""
    curly_brackets: bool = True
    """Drop documents with ``{`` or ``}``: they are mostly code."""
    min_sentences: Count | None = 3
    """Drop documents of fewer sentences, counted in the lines that stay."""

    def broken(self, texts: pa.Array) -> list[Broken]:
        """Return the rules on whole documents that need no lines, and the texts that break each."""
        found: list[Broken] = []
        if self.lorem_ipsum:
            found.append(("c4_lorem_ipsum", contains(texts, "(?i)lorem ipsum")))
        if self.curly_brackets:
            found.append(("c4_curly_brackets", contains(texts, "[{}]")))
        return found

    def remove_lines(self, texts: pa.Array) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
        """Take out what the rules on lines name.

        Returns:
            The texts; how many lines of each were removed, by `LINE_REASONS`, and citations at the end, shape
            (texts, reasons + 1); and the sentences left in each.
        """
        counts = np.zeros((len(texts), len(LINE_REASONS) + 1), np.int64)
        if self.remove_citations:
            texts, counts[:, -1] = without_citations(texts)
        data, offsets = buffers(texts)
        rules = np.array(
            [
                -1 if self.max_word_length is None else self.max_word_length,
                int(self.terminal_mark),
                self.min_words_per_line or 0,
                int(self.javascript),
                int(self.policy),
            ]
        )
        left = np.empty(int(offsets[-1] - offsets[0]), np.uint8)
        ends = np.zeros(len(texts) + 1, np.int32)
        sentences = np.zeros(len(texts), np.int64)
        suspect = (
            contains(texts, PHRASES) if self.javascript or self.policy else np.zeros(len(texts), np.bool_)
        )
        filter_lines(
            data, offsets, rules, suspect, character_kinds(), *phrases(), left, ends, counts, sentences
        )
        return from_buffers(left[: ends[-1]], ends), counts, sentences


def contains(texts: pa.Array, pattern: str) -> NDArray[np.bool_]:
    return pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)


def without_citations(texts: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the texts without marks of citations, and how many each had."""
    found = pc.count_substring_regex(texts, CITATIONS).to_numpy(zero_copy_only=False).astype(np.int64)
    rows = np.flatnonzero(found)
    without = pc.replace_substring_regex(texts.take(pa.array(rows)), CITATIONS, "")
    return replace_rows(texts, rows, pc.utf8_trim_whitespace(without)), found


@cache
def character_kinds() -> NDArray[np.uint8]:
    table = np.zeros(TABLE_SIZE, np.uint8)
    for code in range(TABLE_SIZE):
        one = chr(code)
        table[code] = (SPACE if one.isspace() else 0) | (WORD if one.isalnum() else 0)
    for flag, characters in (
        (TERMINAL, ASCII_ENDS + OTHER_ENDS + CLOSING_QUOTES),
        (END, ASCII_ENDS),
        (OTHER_END, OTHER_ENDS),
        (CLOSER, ")]}'’）】" + CLOSING_QUOTES),
        (UNENDED, unended_letters()),
    ):
        for one in characters:
            table[ord(one)] |= flag
    classes = character_classes()
    table[classes == WORD_UNSPACED] |= UNSPACED | WORD
    table[classes == MARK] &= ~WORD
    return table


@cache
def phrases() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return ``javascript`` and the `POLICIES`: their bytes, and where each begins and ends."""
    words = ["javascript", *POLICIES]
    return np.frombuffer("".join(words).encode(), np.uint8), np.cumsum([0, *map(len, words)])


@kernel
def kind_at(data: NDArray[np.uint8], at: int, kinds: NDArray[np.uint8]) -> tuple[np.uint8, int]:
    """Return the kind of the character at byte ``at`` of valid UTF-8, and its length in bytes."""
    code, length = code_point(data, at)
    return (kinds[code] if code < len(kinds) else np.uint8(0)), length


@kernel
def scan_line(
    data: NDArray[np.uint8], start: int, end: int, kinds: NDArray[np.uint8]
) -> tuple[int, int, int, int, np.uint8]:
    """Find where a line begins and ends without white space, its words, its longest one, its last character's kind."""
    first, last = end, start
    words = longest = letters = 0
    tail = seen = np.uint8(0)
    at = start
    while at < end:
        kind, length = kind_at(data, at, kinds)
        if kind & SPACE:
            letters = 0
            seen = np.uint8(0)
        else:
            if (kind | seen) & UNSPACED and kind & seen & WORD:
                letters = 0
                seen = np.uint8(0)
            seen |= kind
            words += letters == 0
            letters += 1
            longest = max(longest, letters)
            first = min(first, at)
            last = at + length
            tail = kind
        at += length
    return first, max(first, last), words, longest, tail


@kernel
def count_sentences(data: NDArray[np.uint8], start: int, end: int, kinds: NDArray[np.uint8]) -> int:
    """Count the sentences of a line: each ends with one of ``.?!``, maybe a closing bracket or quotation mark, and
    white space.

    Other marks need no space, and of Thai and Lao, which have no marks, a space is the end. What follows the last one
    is a sentence too, and none is without a letter or digit. ``Mr. Hyde`` makes two.
    """
    sentences = 0
    open_sentence = ending = unended = False
    at = start
    while at < end:
        kind, length = kind_at(data, at, kinds)
        at += length
        if kind & WORD:
            open_sentence = True
            ending = False
            unended = kind & UNENDED != 0
        elif kind & UNENDED:  # a vowel sign
            unended = True
        elif kind & END:
            ending = True
        elif kind & OTHER_END or (kind & SPACE and (ending or unended)):
            sentences += open_sentence
            open_sentence = ending = unended = False
        elif not kind & CLOSER:
            ending = False
    return sentences + open_sentence


@kernel
def find_phrase(
    data: NDArray[np.uint8], start: int, end: int, phrases: NDArray[np.uint8], bounds: NDArray[np.int64]
) -> int:
    """Return a bit for each phrase (lower case, ASCII) that stands between these bytes, in any case."""
    found = 0
    for at in range(start, end):
        byte = data[at] | 0x20
        if byte != 106 and byte != 116 and byte != 112 and byte != 99 and byte != 117:  # their first letters
            continue
        for phrase in range(len(bounds) - 1):
            size = bounds[phrase + 1] - bounds[phrase]
            if at + size > end:
                continue
            same = True
            for offset in range(size):
                byte = data[at + offset]
                lower = byte | 0x20 if 65 <= byte <= 90 else byte
                if lower != phrases[bounds[phrase] + offset]:
                    same = False
                    break
            if same:
                found |= 1 << phrase
    return found


@kernel
def judge(
    data: NDArray[np.uint8],
    first: int,
    last: int,
    words: int,
    longest: int,
    tail: np.uint8,
    rules: NDArray[np.int64],
    suspect: bool,
    phrases: NDArray[np.uint8],
    bounds: NDArray[np.int64],
) -> int:
    """Return the first of `LINE_REASONS` for which a line goes; -1 where it stays. ``rules``: see
    `C4Rules.remove_lines`."""
    if rules[LONG_WORD] >= 0 and longest > rules[LONG_WORD]:
        return LONG_WORD
    if rules[NO_TERMINAL_MARK]:
        dots = last - first >= 3 and data[last - 1] == 46 and data[last - 2] == 46 and data[last - 3] == 46
        if dots or not tail & (TERMINAL | UNENDED):
            return NO_TERMINAL_MARK
    if words < rules[FEW_WORDS]:
        return FEW_WORDS
    if suspect:
        found = find_phrase(data, first, last, phrases, bounds)
        if rules[JAVASCRIPT] and found & 1:
            return JAVASCRIPT
        if rules[POLICY] and found > 1:
            return POLICY
    return -1


@kernel
def filter_lines(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    rules: NDArray[np.int64],
    suspect: NDArray[np.bool_],
    kinds: NDArray[np.uint8],
    phrases: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    left: NDArray[np.uint8],
    ends: NDArray[np.int32],
    counts: NDArray[np.int64],
    sentences: NDArray[np.int64],
) -> None:
    """Write each text without the lines that go into ``left``, up to ``ends``; see `C4Rules.remove_lines`.

    ``suspect`` texts hold one of the phrases somewhere: which line does is sought in them alone.
    """
    to = 0
    for row in range(len(offsets) - 1):
        begin = to
        removed = False
        gap = False  # a blank line since the last line that stayed
        start = offsets[row]
        while start < offsets[row + 1]:
            end = start
            while end < offsets[row + 1] and data[end] != 10:
                end += 1
            first, last, words, longest, tail = scan_line(data, start, end, kinds)
            if words == 0:
                gap = True
            else:
                reason = judge(data, first, last, words, longest, tail, rules, suspect[row], phrases, bounds)
                if reason >= 0:
                    counts[row, reason] += 1
                    removed = True
                else:
                    sentences[row] += count_sentences(data, first, last, kinds)
                    if to > begin:
                        for _ in range(2 if gap else 1):
                            left[to] = 10
                            to += 1
                        start_of_line = start
                    else:
                        start_of_line = first
                    left[to : to + last - start_of_line] = data[start_of_line:last]
                    to += last - start_of_line
                    gap = False
            start = end + 1
        if not removed:
            size = offsets[row + 1] - offsets[row]
            left[begin : begin + size] = data[offsets[row] : offsets[row + 1]]
            to = begin + size
        ends[row + 1] = to
