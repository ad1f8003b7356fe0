"""Files that a config names: a fingerprint holds what is in them, never where they are."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256
from data_pipeline.core.hub_files import local
from data_pipeline.core.shipped import unshipped
from data_pipeline.core.text import first_line


@dataclass(frozen=True)
class PinnedFile:
    """A file as it was when the run was planned."""

    path: Path
    """Absolute, so that a worker with another current folder finds it."""
    sha256: str

    def read(self) -> bytes:
        """Return the file's bytes, decompressed where its name ends in ``.gz``.

        Raises:
            UserError: it can't be read, or is no longer what was planned.
        """
        try:
            content = self.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.sha256:
                raise UserError(f"{self.path} changed since the run was planned: start the run again")
            return gzip.decompress(content) if self.path.suffix == ".gz" else content
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} can't be read: {first_line(error)}") from None

    def text(self) -> str:
        """Return what `read` gives, as UTF-8.

        Raises:
            UserError: it is not.
        """
        try:
            return self.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None

    def json_lines(self) -> Iterator[tuple[int, Any]]:
        """Yield the values of JSON lines with the lines' numbers, empty lines left out.

        Raises:
            UserError: a line is no JSON.
        """
        for number, line in enumerate(self.text().split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{self.path}, line {number}: no JSON: {error}") from None

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines with their numbers (from 1), stripped; empty ones and those that begin with ``#`` are left
        out."""
        for number, line in enumerate(self.text().split("\n"), 1):
            if (stripped := line.strip()) and not stripped.startswith("#"):
                yield number, stripped


def pin(paths: Iterable[Path], key: str) -> tuple[PinnedFile, ...]:
    """Return the files as they are now, those on the hub and those that llmill ships too; ``key`` is the setting that
    names them.

    Raises:
        UserError: one of them can't be read.
        Unresolved: one is on the hub, which can't be reached.
    """
    pinned = []
    for path in (local(unshipped(one, key), key) for one in paths):
        try:
            pinned.append(PinnedFile(path.absolute(), file_sha256(path)))
        except OSError as error:
            raise UserError(f"{key}: {path} can't be read: {error.strerror}") from None
    return tuple(pinned)


def content_sha256(files: Mapping[str, Path]) -> str:
    """Hash the names (the keys) and contents of files, wherever they lie.

    Raises:
        UserError: one can't be read.
    """
    names = sorted(files)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
            hashes = list(pool.map(lambda name: file_sha256(files[name]), names))
    except OSError as error:
        raise UserError(f"{error.filename} can't be read: {error.strerror}") from None
    described = json.dumps(list(zip(names, hashes, strict=True)), allow_nan=False)
    return hashlib.sha256(described.encode()).hexdigest()
