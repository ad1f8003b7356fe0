"""Drop documents that share word n-grams with evaluation sets.

Brown et al. 2020, "Language Models are Few-Shot Learners" (GPT-3), appendix C: 13-grams of lower-cased words without
punctuation, separated by white space; lm-evaluation-harness and others do the same. They cut out 200 characters
around a match and drop a document cut into more than ten slices; here a document is dropped whole, if it has as many
matches as the config sets. An item of fewer words than an n-gram has is not looked for; the report counts those.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from data_pipeline.clean.normalise import Form, normalise
from data_pipeline.clean.sequences import Sequences
from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.core.text import first_line
from data_pipeline.core.words import words_of

SUFFIXES = (".txt", ".jsonl", ".parquet")
NGRAM = 13


class EvaluationSet(Config):
    """One evaluation set, as a file: ``.txt`` (one text), ``.jsonl`` (both also ``.gz``) or ``.parquet``."""

    path: Path
    """The file."""
    fields: tuple[str, ...] = ("text",)
    """Fields of a JSON line or a Parquet row to look for (questions, answers, ...); a list counts by its items."""

    @field_validator("path")
    @classmethod
    def _kind_is_known(cls, path: Path) -> Path:
        if not path.name.removesuffix(".gz").endswith(SUFFIXES):
            raise ValueError(f"{path} is neither of {', '.join(SUFFIXES)}")
        return path


class Decontamination(Config):
    """Which sets, and how much of one a document may hold."""

    sets: dict[str, EvaluationSet] = Field(min_length=1)
    """Sets by name, under which matches are counted; of several that match, the first in alphabet is the reason."""
    ngram: int = Field(default=NGRAM, ge=1)
    """Words of an item that are looked for together."""
    min_matches: int = Field(default=1, ge=1)
    """A document is dropped if at least so many of its n-grams stand in one set."""
    min_fraction: Annotated[float, Field(ge=0, le=1)] = 0
    """And if they are at least this fraction of all its n-grams: spares books that quote a line of a test."""


class Contamination:
    """The n-grams of all sets of a config."""

    def __init__(self, rules: Decontamination, files: tuple[PinnedFile, ...], form: Form | None) -> None:
        self._rules = rules
        self._names = sorted(rules.sets)  # a fingerprint does not depend on the order in a recipe
        items: list[str] = []
        self._set_of: list[int] = []
        for (name, chosen), file in zip(rules.sets.items(), files, strict=True):
            found = [normalise(item, form) for item in read_items(file, chosen.fields)]
            items += found
            self._set_of += [self._names.index(name)] * len(found)
        self._sequences = Sequences(items, ngram=rules.ngram, joined=True, groups=self._set_of)

    def describe(self) -> list[tuple[str, int, int, int]]:
        """List of each set its name, its items, how many are too short to be looked for, and its n-grams."""
        windows = self._sequences.windows
        sets = np.array(self._set_of)
        return [
            (name, int(mine.sum()), int((windows[mine] == 0).sum()), int(windows[mine].sum()))
            for number, name in enumerate(self._names)
            for mine in [sets == number]
        ]

    def find(self, texts: pa.Array) -> Iterator[tuple[int, str, str]]:
        """Yield the rows to drop: (row, reason with the set's name, an n-gram that was found)."""
        first: dict[tuple[int, int], str] = {}
        matches: dict[int, Counter[int]] = {}
        for match in self._sequences.find(texts):
            number = self._set_of[match.item]
            first.setdefault((match.row, number), match.words)
            matches.setdefault(match.row, Counter())[number] += 1
        for row, by_set in matches.items():
            ngrams = len(words_of(texts[row].as_py(), True)) - self._rules.ngram + 1
            needed = max(self._rules.min_matches, self._rules.min_fraction * ngrams)
            enough = [number for number, found in by_set.items() if found >= needed]
            if enough:
                yield row, f"contaminated/{self._names[min(enough)]}", first[row, min(enough)]


def read_items(file: PinnedFile, fields: tuple[str, ...]) -> Iterator[str]:
    """Yield the texts of an evaluation set.

    Raises:
        UserError: the file is broken, lacks a field, or a field holds something else than text.
    """
    name = file.path.name.removesuffix(".gz")
    if name.endswith(".txt"):
        yield file.text()
    elif name.endswith(".jsonl"):
        for number, line in enumerate(file.text().split("\n"), 1):
            if line.strip():
                yield from texts_of(parse(line, file.path, number), fields, f"{file.path}:{number}")
    else:
        try:
            rows = pq.read_table(io.BytesIO(file.read())).to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{file.path} can't be read as Parquet: {first_line(error)}") from None
        for number, row in enumerate(rows):
            yield from texts_of(row, fields, f"{file.path}, row {number}")


def parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: no valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected a JSON object with the fields to look for")
    return row


def texts_of(row: dict[str, Any], fields: tuple[str, ...], where: str) -> Iterator[str]:
    for field in fields:
        if field not in row:
            raise UserError(f"{where}: no field {field!r}; there are {', '.join(map(repr, row))}")
        value = row[field]
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str):
                if not is_utf8(one):
                    raise UserError(f"{where}: {field!r} holds half a surrogate pair, which is no character")
                yield one
            elif one is not None:
                raise UserError(f"{where}: {field!r} holds {type(one).__name__}, not text")


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@lru_cache(maxsize=2)
def cached_contamination(rules: str, files: tuple[PinnedFile, ...], form: Form | None) -> Contamination:
    """Return the sets of a config (as JSON, since a config can't be hashed), read once a process."""
    return Contamination(Decontamination.model_validate_json(rules), files, form)


def contamination(rules: Decontamination, files: tuple[PinnedFile, ...], form: Form | None) -> Contamination:
    """Return the n-grams of the sets of ``rules`` (``files``, in the same order), for texts of a Unicode form."""
    return cached_contamination(rules.model_dump_json(), files, form)
