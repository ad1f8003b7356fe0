"""Kinds of file by their names: the format, the compression around it, and whether it is an archive of files."""

from __future__ import annotations

import os
from typing import Literal, get_args

Format = Literal["txt", "jsonl", "json", "csv", "tsv", "parquet", "warc", "wet", "html"]
"""Formats that a source may give for files whose names have none."""

SUFFIXES = tuple(f".{name}" for name in get_args(Format))
ALIASES = {
    ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".jl": ".jsonl",
    ".md": ".txt",
    ".markdown": ".txt",
    ".tab": ".tsv",
    ".htm": ".html",
    ".xhtml": ".html",
}
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
}
SHORT_TAR = {".tgz": "gzip", ".tzst": "zstd", ".tbz2": "bz2", ".tbz": "bz2", ".txz": "xz"}


def split_suffix(name: str, default: str | None = None) -> tuple[str, str | None]:
    """("books/a.txt.gz") -> (".txt", "gzip"): the format and the compression by a file's name.

    Args:
        default: the format of a file whose name has none that is known.
    """
    stem, last = os.path.splitext(name.lower())
    if last in SHORT_TAR:
        return ".tar", SHORT_TAR[last]
    compression = COMPRESSIONS.get(last)
    suffix = os.path.splitext(stem)[1] if compression else last
    suffix = ALIASES.get(suffix, suffix)
    if default and suffix not in (*SUFFIXES, ".tar", ".zip"):
        suffix = f".{default}"
    return suffix, compression


def is_archive(name: str) -> bool:
    """Return whether this is a ``.zip`` or a ``.tar``, which may be compressed (a ``.zip`` in itself only)."""
    suffix, compression = split_suffix(name)
    return suffix == ".tar" or (suffix == ".zip" and compression is None)


def has_known_suffix(name: str, default: str | None = None) -> bool:
    """Return whether files of this name can be read; ``default`` as in `split_suffix`."""
    return split_suffix(name, default)[0] in SUFFIXES or is_archive(name)


def is_compressed(name: str) -> bool:
    """Return whether the text of such a file is larger than the file."""
    suffix, compression = split_suffix(name)
    return compression is not None or suffix == ".zip"


def suffix_of(name: str) -> str:
    """Name why a file is left out: for its suffix, or for want of one."""
    suffix, compression = split_suffix(name)
    return suffix or ("compressed" if compression else "no suffix")


def known_suffixes() -> str:
    """Return the suffixes of files that can be read, for a person."""
    plain, packed = ", ".join((*SUFFIXES, *ALIASES)), ", ".join(COMPRESSIONS)
    return f"{plain} (also {packed}), .zip or .tar (also .tgz, .tar.zst, ...)"
