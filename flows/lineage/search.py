"""Whether some text is anywhere in a home: in any file, in columns of Parquet and Arrow, as tokens, within compressed
files, in databases and what these have deleted but not overwritten, and in MLflow where that is elsewhere.

Spaces, punctuation and line breaks are passed over, and so are the escapes of JSON, HTML and Python, for copies differ
in them. A text of more than `PIECE` characters is found by any piece of that length.
"""

from __future__ import annotations

import bz2
import gzip
import html
import json
import lzma
import os
import re
import sqlite3
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from flows.engine.services import read_services
from flows.listeners.mlflow.copies import Copies
from flows.listeners.mlflow.lineage import NotAsked
from flows.listeners.mlflow.links import HOME, target

PIECE, LEAST = 40, 8
"""Characters (letters, digits and marks) of what is looked for, and how many there must be."""
MOST_PIECES = 200
CHUNK, OVERLAP = 8 << 20, 1 << 14
UNPACK: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": zstandard.open,
}
"""How packed files begin, and what opens them."""
ROWS = 1024
PASSED_OVER = bytes(code for code in range(128) if not chr(code).isalnum())
ENTITIES = {
    name.encode(): html.unescape(name).encode()
    for name in ("&lt;", "&gt;", "&quot;", "&#x27;", "&#39;", "&#34;", "&amp;")
}
ESCAPE = re.compile(rb"(?:\\u[0-9a-fA-F]{4})+|\\x[0-9a-fA-F]{2}|\\[nrtbfva\\]")
COLOURED = re.compile(rb'<b class=\\*"[vw]\d\\*">([^<]*)</b>')
"""A piece of a text that a comparison's page colours (`flows.compare.heat`)."""
SIGNS = {b"\\": b"\\"}


@dataclass
class Findings:
    """The result of a search."""

    places: list[str] = field(default_factory=list)
    """Where the text is."""
    unread: list[str] = field(default_factory=list)
    """Places that could not be looked into, and why."""
    files: int = 0
    bytes: int = 0


class Needle:
    """The texts that are looked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        if not texts:
            raise UserError("name what is looked for: TEXT or --file FILE")
        found: dict[bytes, None] = {}
        for text in texts:
            letters = sum(char.isalnum() for char in text)
            if letters < LEAST:
                raise UserError(f"{text!r}: give at least {LEAST} letters or digits to look for")
            found |= dict.fromkeys(pieces_of(text))
        self._pieces = tuple(found)

    def is_in(self, data: bytes) -> bool:
        """Whether any piece is there, as it is or behind escapes."""
        if self._is_in(data):
            return True
        for _ in range(2):  # a journal holds JSON within JSON
            plain = unescaped(data)
            if plain == data:
                return False
            if self._is_in(plain):
                return True
            data = plain
        return False

    def _is_in(self, data: bytes) -> bool:
        folded = data.translate(None, PASSED_OVER)
        if any(piece in folded for piece in self._pieces):
            return True
        plain = COLOURED.sub(rb"\1", data)
        return plain != data and self._is_in(plain)


def pieces_of(text: str) -> Iterator[bytes]:
    """The letters, digits and marks of a text, some at a time, in each form in which Unicode may write them."""
    for form in ("NFC", "NFD", "NFKC"):
        folded = unicodedata.normalize(form, text).encode().translate(None, PASSED_OVER).decode()
        starts = range(0, max(1, len(folded) - PIECE + 1), PIECE)
        stride = -(-len(starts) // MOST_PIECES)
        for start in {*starts[::stride], max(0, len(folded) - PIECE)}:
            yield folded[start : start + PIECE].encode()


def unescaped(data: bytes) -> bytes:
    """Return what JSON, Python or HTML mean by ``data``."""
    if b"\\" in data:
        data = ESCAPE.sub(meant_by, data)
    if b"&" in data:
        for name, meant in ENTITIES.items():
            data = data.replace(name, meant)
    return data


def meant_by(escape: re.Match[bytes]) -> bytes:
    text = escape[0]
    if text[1:2] == b"u":
        return str(json.loads(b'"' + text + b'"')).encode("utf-8", "surrogatepass")
    return chr(int(text[2:], 16)).encode() if text[1:2] == b"x" else SIGNS.get(text[1:2], b" ")


class Search:
    """Looks for some texts in files of all kinds."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = Findings()
        self._needle = Needle(texts)
        self._tokenizers: list[Tokenizer] = []

    def folder(self, folder: Path, called: str = "") -> None:
        """Look into all that is in a folder; ``called`` says what stands in for its path in what is reported."""
        paths = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        self._read_tokenizers(path for path in paths if path.name == "tokenizer.json")
        for path in paths:
            name = f"{called}{path.relative_to(folder)}" if called else str(path)
            try:
                if path.is_file():
                    self._file(path, name)
            except FileNotFoundError:
                continue  # a run at work removed it
            except Exception as error:  # whatever is wrong with it, the rest is looked at, and it is reported
                self.found.unread.append(f"{name}: {type(error).__name__}: {error}"[:300])

    def text(self, text: str, name: str) -> None:
        """Look into a text of which there is no file."""
        if self._needle.is_in(text.encode("utf-8", "surrogatepass")):
            self.found.places.append(name)

    def _read_tokenizers(self, paths: Iterable[Path]) -> None:
        known: set[bytes] = set()
        for path in paths:
            try:
                data = path.read_bytes()
                if data not in known:
                    self._tokenizers.append(Tokenizer.from_buffer(data))
                known.add(data)
            except Exception as error:
                self.found.unread.append(f"{path}: {type(error).__name__}: {error}"[:300])

    def _file(self, path: Path, name: str) -> None:
        self.found.files += 1
        self.found.bytes += path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(16)
            file.seek(0)
            if self._stream(file):
                self.found.places.append(name)
        if head.startswith(b"PAR1"):
            self._batches(pq.ParquetFile(path).iter_batches(ROWS), name)
        elif head.startswith(b"ARROW1"):
            with pa.ipc.open_file(path) as opened:
                self._batches((opened.get_batch(n) for n in range(opened.num_record_batches)), name)
        elif head.startswith(b"SQLite format 3\0"):
            self._database(path, name)
        elif head.startswith(b"PK\3\4"):
            self._zip(path, name)
        elif unpack := next((UNPACK[magic] for magic in UNPACK if head.startswith(magic)), None):
            with unpack(path) as file:
                if self._stream(file):
                    self.found.places.append(f"{name}, unpacked")

    def _stream(self, file: IO[bytes]) -> bool:
        """Whether it is in what can be read from ``file``."""
        tail = b""
        while chunk := file.read(CHUNK):
            if self._needle.is_in(tail + chunk):
                return True
            tail = chunk[-OVERLAP:]
        return False

    def _zip(self, path: Path, name: str) -> None:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    if self._stream(file):
                        self.found.places.append(f"{name}, {member}")

    def _batches(self, batches: Iterable[pa.RecordBatch], name: str) -> None:
        seen: set[str] = set()
        for batch in batches:
            for column in set(batch.schema.names) - seen:
                if self._column(batch.column(column)):
                    seen.add(column)
                    self.found.places.append(f"{name}, column {column}")

    def _column(self, values: pa.Array) -> bool:
        """Whether it is in a column, however nested; numbers are taken for tokens."""
        kind = values.type
        if pa.types.is_dictionary(kind):
            return self._column(values.dictionary)
        if pa.types.is_struct(kind):
            return any(self._column(part) for part in values.flatten())
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            inner = values.flatten()
            return self._tokens(inner) if pa.types.is_unsigned_integer(inner.type) else self._column(inner)
        if pa.types.is_map(kind):
            return self._column(values.keys) or self._column(values.items)
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        if not any(is_one(kind) for is_one in texts):
            return False
        whole = pa.concat_arrays([values])  # so that its buffer holds nothing else
        data = whole.buffers()[2]
        return data is not None and self._needle.is_in(data.to_pybytes())

    def _tokens(self, tokens: pa.Array) -> bool:
        ids = tokens.to_numpy(zero_copy_only=False)
        return any(
            self._needle.is_in(one.decode(ids.tolist(), skip_special_tokens=False).encode())
            for one in self._tokenizers
            if len(ids) and ids.max() < one.get_vocab_size()
        )

    def _database(self, path: Path, name: str) -> None:
        """Its rows; what it deleted but did not overwrite is among the bytes of the file."""
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=60)) as opened:
            opened.text_factory = bytes
            tables = [
                row[0].decode()
                for row in opened.execute("select name from sqlite_master where type = 'table'")
            ]
            for table in tables:
                rows = opened.execute('select * from "{}"'.format(table.replace('"', '""')))
                if any(
                    self._needle.is_in(b"\0".join(value for value in row if isinstance(value, bytes)))
                    for row in rows
                ):
                    self.found.places.append(f"{name}, table {table}")


def search(home: Path, texts: Sequence[str]) -> Findings:
    """Look for texts in a home, and in the MLflow that its runs report to, where that is elsewhere.

    Raises:
        UserError: a text is too short for a hit to mean anything.
    """
    looking = Search(texts)
    looking.folder(home)
    if is_elsewhere(home):
        try:
            look_through(home, looking)
        except NotAsked as error:
            looking.found.unread.append(str(error))
    return looking.found


def is_elsewhere(home: Path) -> bool:
    """Whether what MLflow knows is not in files of the home."""
    return target(home) != HOME or read_services(home).database != "SQLite"


def look_through(home: Path, looking: Search) -> None:
    """Look into runs and logged models of an MLflow elsewhere."""
    copies = Copies(home)
    for name, texts, place in copies.everything():
        for text in texts:
            looking.text(text, f"{name} in MLflow")
        with tempfile.TemporaryDirectory(prefix="llmill-find-") as folder:
            copies.fetch(place, Path(folder))
            looking.folder(Path(folder), f"{name} in MLflow: ")
