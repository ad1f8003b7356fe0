"""Texts in the formats that people keep them in, as bytes of a file."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = ["first line\nsecond", "Zürich, 東京", "third \u2028 text"]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": n}).encode() + b"\n" for n, text in enumerate(texts))


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": jsonl,
    ".json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    ".parquet": parquet,
}

TAR = tarfile.TarInfo


def tar(entries: Mapping[str, bytes] | list[tuple[TAR, bytes]]) -> bytes:
    """A tar of files, or of headers made by hand with their contents."""
    sink = io.BytesIO()
    pairs = entries if isinstance(entries, list) else [(TAR(name), data) for name, data in entries.items()]
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for header, data in pairs:
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return sink.getvalue()


def zipped(entries: Mapping[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return sink.getvalue()


def conversion(text: bytes) -> bytes:
    """A record of a web archive that holds a text."""
    head = f"WARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}"
    return f"WARC/1.0\r\n{head}\r\n\r\n".encode() + text + b"\r\n\r\n"
