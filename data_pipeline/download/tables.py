"""CSV and TSV: rows of fields whose names stand in the first row (RFC 4180, with any line ends)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import BufferedReader

from data_pipeline.core.text import excerpt
from data_pipeline.documents import MAX_DOCUMENT_BYTES
from data_pipeline.download.lines import TextLines, TooLong
from data_pipeline.download.records import Record, Rejected, pick


def read_table(
    stream: BufferedReader, text_field: str, meta_fields: Sequence[str], delimiter: str, quotes: bool
) -> Iterator[Record]:
    """Yield the rows of a table after the first, which names the fields; blank lines don't count."""
    rows = table_rows(stream, delimiter, quotes)
    names = next(rows, None)
    if names is None:
        yield Rejected(None, "empty", "")
        return
    if isinstance(names, Rejected):
        names.row = None
        yield names
        return
    if text_field not in names:
        detail = f"no column {text_field!r} among {names[:8]}, which the first line names"
        yield Rejected(None, "missing_field", f"{detail}; they are told apart by {delimiter!r}"[:300])
        return
    twice = [name for name in (text_field, *meta_fields) if names.count(name) > 1]
    if twice:
        yield Rejected(None, "repeated_column", f"several columns are called {twice[0]!r}"[:300])
        return
    for row, values in enumerate(rows):
        if isinstance(values, Rejected):
            values.row = row
            yield values
        elif len(values) != len(names):
            yield Rejected(
                row, "bad_csv", f"{len(values)} fields, not {len(names)}: {excerpt(str(values), 80)}"
            )
        else:
            yield pick(row, dict(zip(names, values, strict=True)), text_field, meta_fields)


def table_rows(stream: BufferedReader, delimiter: str, quotes: bool) -> Iterator[list[str] | Rejected]:
    """Yield the fields of each row that isn't blank, or why it can't be read."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = TextLines(stream)
    rows = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE, strict=True
    )
    while True:
        first = lines.read + 1
        try:
            values = next(rows)
        except StopIteration:
            return
        except TooLong as error:
            yield Rejected(None, "too_large", str(error))
        except csv.Error as error:
            yield Rejected(None, "bad_csv", explained(error, first, lines.read, quotes))
        else:
            if lines.fault:
                yield Rejected(None, "not_utf8", lines.fault)
            elif values:
                yield values
        lines.take_fault()


def explained(error: csv.Error, first: int, last: int, quotes: bool) -> str:
    """Return what is wrong with the lines ``first`` to ``last``, which were read as one row."""
    where = f"line {first}" if first == last else f"lines {first} to {last}, read as one row"
    hint = "; where quotes are part of the text, set the source's quotes to false" if quotes else ""
    return f"{where}: {error}{hint}"
