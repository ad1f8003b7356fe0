"""Texts with labels out of files: CSV, TSV, JSON lines, JSON or Parquet; a row that is none is rejected with why."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile
from llm.chat.conversations import Rejected, rows_of, text_of, written
from llm.classify.config import LabelledFile

TEXTS = ("text", "sms", "sentence", "content", "message", "review", "body", "document")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic")
"""Names that columns of texts and of labels often have, whatever their case."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 1 << 30
"""Characters of a CSV cell that are read: as many as there are."""


class Labelled(NamedTuple):
    """A row of a file."""

    number: int
    """From 1, of the rows under the heading."""
    text: str = ""
    labels: tuple[str, ...] = ()
    rejected: str = ""
    """Why it is no text with a label."""
    content: str = ""
    """A rejected row as it stands, so that it can be looked at."""


def read_texts(one: LabelledFile, file: PinnedFile, *, several: bool) -> Iterator[Labelled]:
    """Read the rows of a file.

    Raises:
        UserError: it can't be read, or has no such columns.
    """
    columns: Columns | None = None
    for number, row in enumerate(table_rows(file), 1):
        try:
            if not isinstance(row, dict):
                raise Rejected(
                    "no JSON object" if file_suffix(file) not in SEPARATORS else "other number of cells"
                )
            columns = columns or Columns.of(row, one, file)
            text = text_of(row.get(columns.text))
            if not text.strip():
                raise Rejected("no text")
            yield Labelled(number, text, labels_of(row.get(columns.label), several=several))
        except Rejected as error:
            reason = "no text" if str(error) == "no answer" else str(error)
            yield Labelled(number, rejected=reason, content=written(row))


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read."""

    text: str
    label: str

    @classmethod
    def of(cls, row: Mapping[str, Any], one: LabelledFile, file: PinnedFile) -> Columns:
        """Find them in a file's first row.

        Raises:
            UserError: they are not there.
        """
        names = [name for name in row if isinstance(name, str)]
        label = one.label or known(names, LABELS)
        text = one.text or known(names, TEXTS)
        if text is None and label in names and len(names) == 2:
            [text] = [name for name in names if name != label]
        for wanted, found in (("text", text), ("label", label)):
            if found not in names:
                called = f"no column {found!r}" if found else f"no column that is known to hold the {wanted}"
                raise UserError(
                    f"{file.path} has {called}, but {', '.join(map(repr, names))}:\n"
                    f"name it in classify.data, {wanted}: NAME"
                )
        assert text is not None
        assert label is not None
        return cls(text=text, label=label)


def known(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the first of ``names`` that is a usual one; None where none is."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    return next((lower[one] for one in usual if one in lower), None)


def file_suffix(file: PinnedFile) -> str:
    """Return the ending of a file's name that says what it holds."""
    name = file.path.name.removesuffix(".gz").lower()
    return name[name.rfind(".") :] if "." in name else ""


def table_rows(file: PinnedFile) -> Iterator[Any]:
    """Yield the rows of a file as objects; one that is none as it stands.

    Raises:
        UserError: it can't be read.
    """
    separator = SEPARATORS.get(file_suffix(file))
    if separator is None:
        yield from rows_of(file)
        return
    csv.field_size_limit(LONGEST_CELL)
    text = io.StringIO(file.text().removeprefix("\ufeff"), newline="")
    quoted = separator == ","
    cells = csv.reader(text) if quoted else csv.reader(text, delimiter=separator, quoting=csv.QUOTE_NONE)
    heading = next(cells, None)
    if not heading:
        raise UserError(f"{file.path} is empty: its first line names the columns")
    for row in cells:
        if row:
            yield dict(zip(heading, row, strict=True)) if len(row) == len(heading) else separator.join(row)


def labels_of(value: Any, *, several: bool) -> tuple[str, ...]:
    """Return the labels in a cell.

    Raises:
        Rejected: there is none, or other than text and numbers.
    """
    if not several:
        return (label_of(value),)
    if value is None:
        return ()
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list):
        value = [value]
    return tuple(sorted({label_of(one) for one in value}))


def label_of(value: Any) -> str:
    """Return a label as text.

    Raises:
        Rejected: it is none.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Rejected("no label")
    if not isinstance(value, str):
        raise Rejected("a label that is no text or number")
    return text_of(value).strip()
