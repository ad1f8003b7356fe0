"""Lists of addresses, of phrases and of documents that are dropped, from files that the recipe names.

One entry a line; empty lines and those that begin with ``#`` are skipped. An entry of an address list is a host
(``example.com``, which takes its subdomains with it) or a host with a path (``example.com/shop``, which takes the
pages below with it); the document's own address is ``url`` in its ``meta``. A phrase is found in any case and at the
bounds of words, whatever punctuation and space stand between its words. An entry of a list of ids is a document's id,
or a file's (``source/file``), which takes all of its records with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.clean.normalise import Form, normalise
from data_pipeline.clean.sequences import Sequences
from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.core.words import words_of

BLOCKED_ID = "blocked_id"
SCHEME = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")


class Blocklists(Config):
    """Files of entries, one a line; ``.gz`` is decompressed."""

    urls: tuple[Path, ...] = ()
    """Hosts, or hosts with a path: documents from there are dropped."""
    phrases: tuple[Path, ...] = ()
    """Documents that hold one are dropped."""
    ids: tuple[Path, ...] = ()
    """Ids of documents that must not be used, by whoever's wish: none of their text is kept, not even as an example."""


class UrlBlocklist:
    """Hosts and pages, and how an address is looked up among them."""

    def __init__(self, files: tuple[PinnedFile, ...]) -> None:
        self._entries: set[str] = set()
        for file in files:
            for number, line in file.lines():
                host, path = split_url(line)
                if not host or re.search(r"\s", host):
                    raise UserError(f"{file.path}:{number}: {line!r} is no host, nor a host with a path")
                self._entries.add(host + path)
        self._labels = max((entry.split("/")[0].count(".") + 1 for entry in self._entries), default=1)
        self._segments = max((entry.count("/") for entry in self._entries), default=0)

    def blocks(self, url: str) -> str | None:
        """Return the entry that blocks an address, if any does."""
        host, path = split_url(url)
        labels = host.split(".")[-self._labels :]  # no deeper than the list is: addresses may be long
        segments = path.split("/")[1 : self._segments + 1]
        for first in range(len(labels)):
            entry = ".".join(labels[first:])
            for segment in ["", *(f"/{one}" for one in segments)]:
                entry += segment
                if entry in self._entries:
                    return entry
        return None

    def find(self, metas: pa.Array) -> Iterator[tuple[int, str, str]]:
        """Yield the rows that are blocked: (row, reason, the entry). Equal metas are looked at once."""
        coded = pc.dictionary_encode(metas)
        urls = [json.loads(meta).get("url") for meta in coded.dictionary.to_pylist()]
        entries = [self.blocks(url) if isinstance(url, str) else None for url in urls]
        for row, code in enumerate(coded.indices.to_pylist()):
            if (entry := entries[code]) is not None:
                yield row, "blocked_url", entry


def split_url(url: str) -> tuple[str, str]:
    """Host (lower case, without a last dot) and path (without a last slash) of an address, with a scheme or not."""
    try:
        parts = urlsplit(url if SCHEME.match(url) else f"//{url}")
        host = parts.hostname or ""
    except ValueError:  # brackets that hold no address
        return "", ""
    return host.removeprefix("*.").rstrip("."), parts.path.rstrip("/")


class PhraseBlocklist:
    """Phrases, and how texts of a Unicode form are searched for them."""

    def __init__(self, files: tuple[PinnedFile, ...], form: Form | None) -> None:
        self._phrases: list[str] = []
        for file in files:
            for number, line in file.lines():
                if not words_of(line, False):
                    raise UserError(f"{file.path}:{number}: {line!r} holds no word: it would never be found")
                self._phrases.append(line)
        normal = [normalise(phrase, form) for phrase in self._phrases]
        self._sequences = Sequences(normal, ngram=None, joined=False)

    def find(self, texts: pa.Array) -> Iterator[tuple[int, str, str]]:
        """Yield the rows with a phrase of the list: (row, reason, the phrase), the first in the text standing for
        all."""
        last = -1
        for match in self._sequences.find(texts):
            if match.row != last:
                last = match.row
                yield match.row, "blocked_phrase", self._phrases[match.item]


class IdBlocklist:
    """Ids of documents and of files."""

    def __init__(self, files: tuple[PinnedFile, ...]) -> None:
        entries = {line for file in files for _, line in file.lines()}
        self._entries = pa.array(sorted(entries), pa.string())

    def find(self, ids: pa.Array) -> Iterator[tuple[int, str, str]]:
        """Yield the rows that are blocked: (row, reason, the id)."""
        files = pc.replace_substring_regex(ids, r"#[^#/]*$", "")
        found = pc.or_(pc.is_in(ids, self._entries), pc.is_in(files, self._entries))
        for row in np.flatnonzero(found.to_numpy(zero_copy_only=False)).tolist():
            yield row, BLOCKED_ID, ids[row].as_py()


@lru_cache(maxsize=2)
def id_blocklist(files: tuple[PinnedFile, ...]) -> IdBlocklist:
    return IdBlocklist(files)


@lru_cache(maxsize=2)
def url_blocklist(files: tuple[PinnedFile, ...]) -> UrlBlocklist:
    return UrlBlocklist(files)


@lru_cache(maxsize=2)
def phrase_blocklist(files: tuple[PinnedFile, ...], form: Form | None) -> PhraseBlocklist:
    return PhraseBlocklist(files, form)
