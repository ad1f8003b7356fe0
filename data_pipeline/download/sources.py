"""Where text comes from: the kinds of source, and the pinned listing of what each holds.

A listing is what a source consists of (relative names, sizes, hashes or revisions). It is made when a run is
planned; its hash is part of the identity of the downloaded artifact, so that a changed file is a new artifact,
while absolute paths are not, so that the same files elsewhere are the same artifact. No source has a key, a
password or a token among its options: drivers find these where the user keeps them (environment, ~/.netrc,
~/.aws, ...), so they can't reach a manifest.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from data_pipeline.core.config import Config
from data_pipeline.download.formats import Format, has_known_suffix, known_suffixes
from data_pipeline.download.html import HtmlRules

SourceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Listed(Config):
    """One file (or remote data set) of a source, as it was when the run was planned."""

    name: str
    """Relative to the source, with ``/``; document ids begin with it."""
    size: int
    """Bytes as stored; 0 where it isn't known."""
    version: str
    """Pin of its content: ``sha256:...``, ``etag:...``, ``last-modified:...`` or ``commit:...``."""
    location: str
    """Absolute path or URL. No part of the identity."""


@dataclass(frozen=True)
class Listing:
    """The files of a source, and how many others it has that are not read, by reason (their suffix, a link ...)."""

    files: tuple[Listed, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def without_password(url: str | None) -> str | None:
    """Return ``url``, if it carries no user name or password: these would end up in every document."""
    if url and "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError("an address with a user name or password in it")
    return url


class TextSource(Config):
    """Settings that all kinds of source share."""

    name: SourceName
    """Ids of the source's documents begin with it."""
    text_field: str = "text"
    """Field or column that holds the text, in JSON and Parquet."""
    text_format: Literal["plain", "html"] = "plain"
    """Whether fields and columns hold texts, or pages of HTML whose main text is to be taken out."""
    html: HtmlRules = HtmlRules()
    """How it is taken out, of fields, files and records of web archives."""
    meta_fields: tuple[str, ...] = ()
    """Fields or columns kept in each document's ``meta``, where it has them: a URL, a date, a quality score."""
    license: str | None = None
    """Kept with each document, and named in the model card."""
    url: Annotated[str | None, AfterValidator(without_password)] = None
    """Where the text comes from, for a person; kept with each document, as is the licence."""
    retrieved: date | None = None
    """The day on which the text was taken from there, as its collector states. Never the clock's: the same
    recipe gives the same bytes on any day."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Facts kept with every document of the source; a field of the document's own name comes before them."""
        stated = {"license": self.license, "url": self.url}
        stated |= {"retrieved": self.retrieved.isoformat() if self.retrieved else None}
        return {key: value for key, value in stated.items() if value}


def text_encoding(name: str) -> str:
    """Return the standard name of an encoding."""
    try:
        found = codecs.lookup(name)
    except LookupError:
        raise ValueError("no encoding of this name: try utf-8, utf-16, latin-1, cp1252, ...") from None
    if not found._is_text_encoding or found.incrementaldecoder is None:
        raise ValueError("not an encoding of text")
    return found.name


class FileSource(TextSource):
    """Settings that sources of files share: how these are read."""

    split: Literal["none", "paragraphs", "lines"] = "none"
    """Which part of a ``.txt`` is a document: all of it, each paragraph (blank lines lie between), or each line."""
    split_chars: int | None = Field(default=None, gt=0)
    """Cut each ``.txt`` at ends of paragraphs into documents of at least this many characters (books)."""
    format: Format | None = None
    """Format of files whose names don't end with a known suffix (``part-00000``)."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Between the fields of ``.csv`` (by default a comma) and ``.tsv`` (a tab)."""
    quotes: bool = True
    """Whether a field of ``.csv`` and ``.tsv`` may stand in double quotes; false where these are part of the text."""
    encoding: Annotated[str, AfterValidator(text_encoding)] = "utf-8"
    """Encoding of ``.txt``, JSON, CSV, and of web archives where these name none. It is never guessed: what isn't in
    this encoding is rejected."""
    max_expansion: float = Field(default=200, gt=0)
    """A compressed file or an archive is read until it held this many times its own size (or 100 MB, if that is
    more). Beyond is a decompression bomb: text shrinks to a tenth or so."""
    max_unpacked_bytes: int = Field(default=1_000_000_000_000, gt=0)
    """The same, in bytes."""

    @model_validator(mode="after")
    def _split_one_way(self) -> Self:
        if self.split_chars and self.split == "lines":
            raise ValueError("split_chars cuts at paragraphs, split: lines at lines: leave one of them away")
        return self


class LocalSource(FileSource):
    """Files of this machine: a file, a folder (all files in it with a known suffix) or a glob pattern."""

    kind: Literal["local"] = "local"
    path: str
    """A file, a folder or a glob pattern."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Reading ends with the file (in order of name) that reaches this many bytes as stored."""


class InstalledPythonSource(TextSource):
    """Sources and documentation of the Python that runs this: its standard library, then installed packages."""

    kind: Literal["installed-python"] = "installed-python"
    max_bytes: int | None = Field(default=None, gt=0)
    """Reading ends with the file (in order) that reaches this many bytes."""


def without_credentials(url: str) -> str:
    """Return ``url``, if it carries no user name or password: these would end up in manifests."""
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


class HttpSource(FileSource):
    """Files fetched by HTTP(S); the suffix of the address's path gives the format. Uses ~/.netrc."""

    kind: Literal["http"] = "http"
    urls: tuple[Annotated[str, AfterValidator(without_credentials)], ...] = Field(min_length=1)
    """Addresses of the files."""
    sha256: dict[str, str] = Field(default_factory=dict)
    """Expected hash by address; optional."""

    @field_validator("urls", "sha256", mode="before")
    @classmethod
    def _said_without_addresses(cls, given: Any) -> Any:
        """Refuse here what pydantic would refuse with the address, whose query may hold a key, in its message."""
        if isinstance(given, str):
            raise ValueError("not one address but a list of them, or a mapping of them to hashes")
        if isinstance(given, dict):
            for url, digest in given.items():
                if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                    raise ValueError(
                        f"{url_name(str(url))}: not the 64 digits (in quotes, 0-9a-f) of a sha256"
                    )
        return given

    @field_validator("urls")
    @classmethod
    def _distinct(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        seen: set[str] = set()
        for url in urls:
            name = url_name(url)
            if name in seen:
                raise ValueError(f"two addresses stand for {name}; a document's id is made of host and path")
            seen.add(name)
        return urls

    @model_validator(mode="after")
    def _readable(self) -> HttpSource:
        for url in self.urls:
            if not has_known_suffix(urlsplit(url).path, self.format):
                raise ValueError(
                    f"{url_name(url)}: the address's path must end with {known_suffixes()}, or the source say its "
                    "format"
                )
        return self

    @model_validator(mode="after")
    def _hashes_of_urls(self) -> HttpSource:
        known = set(self.urls)
        for url in self.sha256:
            if url not in known:
                raise ValueError(f"sha256 names {url_name(url)}, which is not among urls")
        return self


NOT_STORES = {
    "file": "use `kind: local`",
    "local": "use `kind: local`",
    "http": "use `kind: http`",
    "https": "use `kind: http`",
    "hf": "use `kind: huggingface`",
    "memory": "it is gone when the process ends",
    "data": "it holds the data itself",
}
NAMES_A_CONTAINER = ("abfs", "abfss", "az", "wasb", "wasbs")  # as in abfs://container@account.dfs...


def of_a_store(url: str) -> str:
    """Return ``url``, if it is one of an object store and carries no credentials."""
    scheme, colon, rest = url.partition("://")
    if not colon or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or not rest.strip("/"):
        raise ValueError("not an address such as s3://bucket/folder")
    if scheme in NOT_STORES:
        raise ValueError(f"{scheme}:// is no object store: {NOT_STORES[scheme]}")
    if "::" in url:
        raise ValueError("chained addresses (::) are not read; archives are opened by their suffix")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and (":" in user or scheme not in NAMES_A_CONTAINER):
        raise ValueError(
            f"a {scheme}:// address with a user name or password in it; drivers take these from the environment"
        )
    if re.search(r"\?[\w.-]+=", rest):
        raise ValueError(f"a {scheme}:// address with a query, which may hold a key: leave it away")
    return url


class ObjectSource(FileSource):
    """Files of an object store, or of any other file system that `fsspec` knows: one, a folder or a glob pattern.

    Credentials, endpoints and other options of the driver come from where it looks itself (``AWS_PROFILE``,
    ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_CONNECTION_STRING``, ...) or from
    fsspec's own configuration (``FSSPEC_S3='{"anon": true}'``, ~/.config/fsspec/*.json).
    """

    kind: Literal["objects"] = "objects"
    url: Annotated[str, AfterValidator(of_a_store)]
    """``s3://bucket/folder``, ``gs://bucket/*.parquet``, ``az://container/file.jsonl.gz``, ..."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Reading ends with the file (in order of name) that reaches this many bytes as stored."""


class HuggingFaceSource(TextSource):
    """A data set of the Hugging Face Hub, or a local folder that `datasets` loads; read by streaming."""

    kind: Literal["huggingface"] = "huggingface"
    dataset: str
    """Its name on the Hub, or a local folder."""
    config: str | None = None
    """Which of the data set's configs; None: its only one, or the default."""
    split: str = "train"
    """Which of its splits."""
    revision: str | None = None
    """Branch, tag or commit; resolved to a commit when the run is planned."""
    max_rows: int | None = Field(default=None, gt=0)
    """Reading ends after this many rows."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Reading ends with the row that reaches this many bytes of text."""
    max_expansion: float = Field(default=200, gt=0)
    """Times the size of a local folder (or 100 MB) at which the text of each part that is read by itself ends."""


AnySource = LocalSource | InstalledPythonSource | HttpSource | ObjectSource | HuggingFaceSource
Source = Annotated[AnySource, Field(discriminator="kind")]
KINDS: tuple[str, ...] = tuple(model.model_fields["kind"].default for model in get_args(AnySource))
