"""Where text comes from: the kinds of source, and the pinned listing of what each holds.

A listing says what a source consists of (relative names, sizes, hashes or revisions). It is made when a run is
planned; its hash is part of the identity of the downloaded artifact, so that a changed file is a new artifact,
while absolute paths are not, so that the same files elsewhere are the same artifact.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from data_pipeline.context import Config, UserError
from data_pipeline.documents import file_sha256

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

SourceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Listed(Config):
    """One file (or remote data set) of a source, as it was when the run was planned."""

    name: str
    """Relative to the source, with ``/``; document ids begin with it."""
    size: int
    """Bytes as stored; 0 where it isn't known."""
    version: str
    """What pins its content: ``sha256:...``, ``etag:...``, ``last-modified:...`` or ``commit:...``."""
    location: str
    """Absolute path or URL. No part of the identity."""


class TextSource(Config):
    """What all kinds of source share."""

    name: SourceName
    text_field: str = "text"
    """Field or column that holds the text, in JSON and Parquet."""
    license: str | None = None
    url: str | None = None
    """Where the text comes from, for a person; kept with each document, as is the licence."""


class LocalSource(TextSource):
    """Files of this machine: a file, a folder (all files in it with a known suffix) or a glob pattern."""

    kind: Literal["local"] = "local"
    path: str
    max_bytes: int | None = Field(default=None, gt=0)
    """Reading ends with the file (in order of name) that reaches this many bytes as stored."""
    split_chars: int | None = Field(default=None, gt=0)
    """Cut each ``.txt`` at ends of paragraphs into documents of at least this many characters (books)."""


class InstalledPythonSource(TextSource):
    """Sources and documentation of the Python that runs this: its standard library, then installed packages."""

    kind: Literal["installed-python"] = "installed-python"
    max_bytes: int | None = Field(default=None, gt=0)


def without_credentials(url: str) -> str:
    """``url``, if it carries no user name or password: these would end up in manifests."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http:// or https:// address")
    if parts.username or parts.password:
        raise ValueError(f"address on {parts.hostname} holds a user name or password; use ~/.netrc instead")
    return url


def url_name(url: str) -> str:
    """Host and path of an address; a query (it may hold a key) only as a hash, in front of the suffix."""
    parts = urlsplit(url)
    if not parts.query:
        return f"{parts.netloc}{parts.path}"
    stem, slash, last = parts.path.rpartition("/")
    return f"{parts.netloc}{stem}{slash}{hashlib.sha256(parts.query.encode()).hexdigest()[:12]}-{last}"


class HttpSource(TextSource):
    """Files fetched by HTTP(S); the suffix of the address's path says the format. Uses ~/.netrc."""

    kind: Literal["http"] = "http"
    urls: tuple[Annotated[str, AfterValidator(without_credentials)], ...] = Field(min_length=1)
    sha256: dict[str, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default_factory=dict
    )
    """Expected hash by address; optional."""

    @field_validator("urls")
    @classmethod
    def _readable(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not has_known_suffix(urlsplit(url).path):
                raise ValueError(f"{url}: the address's path must end with {known_suffixes()}")
        names = [url_name(url) for url in urls]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two addresses stand for {name}; a document's id is made of host and path")
        return urls

    @model_validator(mode="after")
    def _hashes_of_urls(self) -> HttpSource:
        for url in self.sha256:
            if url not in self.urls:
                raise ValueError(f"sha256 names {url}, which is not among urls")
        return self


class HuggingFaceSource(TextSource):
    """A data set of the Hugging Face Hub, or a local folder that `datasets` loads; read by streaming."""

    kind: Literal["huggingface"] = "huggingface"
    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit; resolved to a commit when the run is planned."""
    max_rows: int | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0)
    """Reading ends with the row that reaches this many bytes of text."""


Source = Annotated[
    LocalSource | InstalledPythonSource | HttpSource | HuggingFaceSource, Field(discriminator="kind")
]


def known_suffixes() -> str:
    return ", ".join(SUFFIXES) + " (also .gz or .zst)"


def split_suffix(name: str) -> tuple[str, str | None]:
    """("books/a.txt.gz") -> (".txt", "gzip"): the format and the compression that a file name says."""
    stem, last = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(last)
    return (os.path.splitext(stem)[1] if compression else last), compression


def has_known_suffix(name: str) -> bool:
    return split_suffix(name)[0] in SUFFIXES


def list_local(source: LocalSource) -> tuple[Listed, ...]:
    """The files of a local source, sorted by name, hashed."""
    root, paths = local_files(source.path)
    readable = [path for path in paths if has_known_suffix(path.name)]
    if not readable:
        raise UserError(
            f"source {source.name}: nothing to read at {source.path} ({len(paths)} files, "
            f"none ending with {known_suffixes()})"
            if paths
            else f"source {source.name}: no file at {source.path}"
        )
    return pin(((path.relative_to(root).as_posix(), path) for path in readable), source.max_bytes)


def local_files(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files that ``path`` (file, folder, glob) stands for."""
    given = Path(path).expanduser().absolute()
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        found = [Path(folder, name) for folder, _, names in walk(given) for name in names]
        return given, sorted(found, key=lambda one: one.relative_to(given).as_posix())
    fixed = Path(*_take_until_magic(given.parts))
    matches = (Path(match) for match in glob.glob(str(given), recursive=True))
    return fixed, sorted({match for match in matches if match.is_file()})  # `**` finds some twice


def _take_until_magic(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in order of name, without hidden files and folders."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, folders, sorted(name for name in names if not name.startswith("."))


OURSELVES = {"data_pipeline", "llm", "flows"}  # else a change to llmill would change its own corpus
PYTHON_TEXT = (".py", ".rst", ".md", ".txt")
NOT_LIBRARY = re.compile(
    r"(site-packages|dist-packages|__pycache__|.*\.(dist-info|egg-info|data)|__editable__.*)$"
)


def list_installed_python(source: InstalledPythonSource) -> tuple[Listed, ...]:
    """Text files of the running Python, as many as ``max_bytes`` admits, hashed."""
    return pin(installed_python_files(), source.max_bytes)


def installed_python_files() -> Iterator[tuple[str, Path]]:
    """(name, path) of the standard library's text files and then those of the installed packages, by name.

    Byte code and what an installer writes (metadata with paths and times, editable hooks) is left out.
    """
    paths = sysconfig.get_paths()
    roots = [
        ("stdlib", paths["stdlib"]),
        ("site-packages", paths["purelib"]),
        ("site-packages", paths["platlib"]),
    ]
    for prefix, root in {os.path.realpath(root): (prefix, root) for prefix, root in roots}.values():
        found = []
        for here, folders, names in walk(Path(root)):
            skipped = OURSELVES if here == root else set()
            folders[:] = [name for name in folders if name not in skipped and not NOT_LIBRARY.match(name)]
            found += [
                Path(here, name)
                for name in names
                if name.endswith(PYTHON_TEXT) and not NOT_LIBRARY.match(name)
            ]
        relative = sorted((path.relative_to(root).as_posix(), path) for path in found)
        yield from ((f"{prefix}/{name}", path) for name, path in relative)


def pin(files: Iterable[tuple[str, Path]], max_bytes: int | None = None) -> tuple[Listed, ...]:
    """Size and hash of files (name, path), until ``max_bytes`` are reached. Files are hashed in threads."""
    chosen: list[tuple[str, Path]] = []
    total = 0
    for name, path in files:
        if max_bytes is not None and total >= max_bytes:
            break
        try:
            total += path.stat().st_size
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from error
        chosen.append((printable(name), path))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return tuple(pool.map(lambda item: pin_file(*item), chosen))


def printable(name: str) -> str:
    """``name`` with what isn't UTF-8 in it (Linux allows that in file names) as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def pin_file(name: str, path: Path) -> Listed:
    """One file as it is now.

    Raises:
        UserError: it can't be read.
    """
    try:
        size = path.stat().st_size
        return Listed(name=name, size=size, version=f"sha256:{file_sha256(path)}", location=str(path))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error


def check_unchanged(listed: Listed) -> None:
    """Make sure that a local file is what it was when the run was planned.

    Raises:
        UserError: it is gone or its content changed.
    """
    if pin_file(listed.name, Path(listed.location)) != listed:
        raise UserError(f"{listed.location} changed since the run was planned; run again")
