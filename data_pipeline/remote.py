"""Sources behind a network: files by HTTP(S), data sets of the Hugging Face Hub.

What is fetched is pinned first: an HTTP file by its expected hash or the server's ETag or Last-Modified, a data set
by its commit (a local data set folder by its files' hashes). A cut transfer goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from data_pipeline.context import Unresolved, UserError
from data_pipeline.readers import Record, Text, pick
from data_pipeline.sources import HttpSource, HuggingFaceSource, Listed, pin, walk

ATTEMPTS = 5
"""Consecutive attempts that bring nothing new, before a transfer is given up."""
BACKOFF_SECONDS = 0.5
"""Wait before the second attempt; doubled for each that follows."""


class Transient(Exception):
    """A fault of the network or the server that may pass."""


def list_http(source: HttpSource) -> tuple[Listed, ...]:
    """The files of an HTTP source; those with an expected hash need no network for this.

    Raises:
        Unresolved: the server can't be reached.
        UserError: the server refuses, or says nothing by which the file could be pinned.
    """
    with client(source) as session:
        return tuple(list_url(session, source, url) for url in source.urls)


def list_url(session: httpx.Client, source: HttpSource, url: str) -> Listed:
    name = url_name(url)
    if url in source.sha256:
        return Listed(name=name, size=0, version=f"sha256:{source.sha256[url]}", location=url)
    try:
        response = session.head(url)
    except httpx.TransportError as error:
        raise Unresolved(f"source {source.name}: can't reach {name}: {error}") from error
    if response.status_code >= 500 or response.status_code == 429:
        raise Unresolved(f"source {source.name}: {name} answers {response.status_code}; try again later")
    if response.is_error:
        raise UserError(f"source {source.name}: {name} answers {response.status_code}: check the address")
    version = version_of(response)
    if version is None:
        raise UserError(
            f"source {source.name}: {name} has neither ETag nor Last-Modified, so a change would go unnoticed; "
            "give its hash under `sha256`"
        )
    return Listed(
        name=name, size=int(response.headers.get("content-length", 0)), version=version, location=url
    )


def client(source: HttpSource) -> httpx.Client:
    """A client that takes passwords from ~/.netrc and content as it is stored."""
    try:
        auth: httpx.Auth | None = httpx.NetRCAuth()
    except FileNotFoundError:
        auth = None
    headers = {"accept-encoding": "identity"}
    return httpx.Client(auth=auth, headers=headers, timeout=source.timeout_seconds, follow_redirects=True)


def url_name(url: str) -> str:
    """Host and path of an address; a query (it may hold a key) only as a hash, in front of the suffix."""
    parts = urlsplit(url)
    if not parts.query:
        return f"{parts.netloc}{parts.path}"
    stem, slash, last = parts.path.rpartition("/")
    return f"{parts.netloc}{stem}{slash}{hashlib.sha256(parts.query.encode()).hexdigest()[:12]}-{last}"


def version_of(response: httpx.Response) -> str | None:
    """What the server says of the content's version."""
    for header in ("etag", "last-modified"):
        if header in response.headers:
            return f"{header}:{response.headers[header]}"
    return None


def fetch(source: HttpSource, listed: Listed, folder: Path) -> Path:
    """Bring a listed file into ``folder`` and check its version, size and (where given) hash.

    A part that an earlier call left is completed by a Range request.

    Raises:
        UserError: it isn't what was listed.
        ConnectionError: `ATTEMPTS` attempts in a row brought nothing new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = hashlib.sha256(listed.name.encode()).hexdigest()[:16]
    part = folder / f"{prefix}-{listed.name.rpartition('/')[2]}"
    fruitless = 0
    with client(source) as session:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                transfer(session, listed, part)
                break
            except (httpx.TransportError, Transient) as error:
                after = part.stat().st_size if part.exists() else 0
                fruitless = 0 if after > before else fruitless + 1
                if fruitless == ATTEMPTS:
                    raise ConnectionError(
                        f"can't fetch {listed.name}: {error} ({ATTEMPTS} attempts)"
                    ) from error
                time.sleep(BACKOFF_SECONDS * 2 ** max(0, fruitless - 1))
    check(listed, part)
    return part


def transfer(session: httpx.Client, listed: Listed, part: Path) -> None:
    """One request for what ``part`` lacks.

    Raises:
        Transient: the server is busy, or ended early.
        UserError: it refuses, or has another version.
    """
    have = part.stat().st_size if part.exists() else 0
    if have and have == listed.size:
        return
    headers = {"range": f"bytes={have}-"} if have else {}
    with session.stream("GET", listed.location, headers=headers) as response:
        status = response.status_code
        if status == 416:  # we hold more than there is
            part.unlink()
            raise Transient("the part on disk was longer than the file")
        if status >= 500 or status == 429:
            raise Transient(f"the server answers {status}")
        if response.is_error:
            raise UserError(f"can't fetch {listed.name}: the server answers {status}")
        pinned_by_server = not listed.version.startswith("sha256:")
        if pinned_by_server and version_of(response) != listed.version:
            part.unlink(missing_ok=True)
            raise UserError(f"{listed.name} changed since the run was planned; run again")
        with open(part, "ab" if status == 206 else "wb") as file:
            for (
                chunk
            ) in response.iter_raw():  # as it comes: a chunk size would hold back what a cut then loses
                file.write(chunk)


def check(listed: Listed, path: Path) -> None:
    """Make sure that what was fetched is what was listed."""
    size = path.stat().st_size
    if listed.size and size != listed.size:
        path.unlink()
        raise UserError(f"{listed.name}: {size} bytes came, {listed.size} were announced; run again")
    kind, _, expected = listed.version.partition(":")
    if kind == "sha256":
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            path.unlink()
            raise UserError(f"{listed.name}: its sha256 is {found}, the recipe expects {expected}")


def list_hugging_face(source: HuggingFaceSource) -> tuple[Listed, ...]:
    """A data set as one listed item, pinned to a commit, or to its files' hashes where it is a local folder.

    Raises:
        Unresolved: the Hub can't be reached (or `HF_HUB_OFFLINE` is set) and ``revision`` is no full commit.
        UserError: the Hub has no such data set or revision.
    """
    name = f"{source.config}/{source.split}" if source.config else source.split
    folder = Path(source.dataset).expanduser()
    if folder.is_dir():
        return (list_folder(name, folder.absolute()),)
    commit = source.revision if re.fullmatch(r"[0-9a-f]{40}", source.revision or "") else hub_commit(source)
    return (Listed(name=name, size=0, version=f"commit:{source.dataset}@{commit}", location=source.dataset),)


def list_folder(name: str, folder: Path) -> Listed:
    """A local data set folder as one listed item."""
    paths = (Path(here, file) for here, _, files in walk(folder) for file in files)
    files = pin((path.relative_to(folder).as_posix(), path) for path in paths)
    if not files:
        raise UserError(f"the data set folder {folder} is empty")
    canonical = json.dumps([[one.name, one.size, one.version] for one in files])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Listed(
        name=name, size=sum(one.size for one in files), version=f"sha256:{digest}", location=str(folder)
    )


def hub_commit(source: HuggingFaceSource) -> str:
    """The commit that ``source.revision`` (default: the main branch) stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"source {source.name}: the Hugging Face Hub"
    try:
        found = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=source.timeout_seconds)
    except HFValidationError as error:
        raise UserError(
            f"source {source.name}: {source.dataset} is no folder here and no name of a data set"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {source.revision}" if source.revision else ""
        raise UserError(f"{asked} has no data set {source.dataset}{at} that you may read") from error
    except (
        Exception
    ) as error:  # offline mode, or whatever the Hub's HTTP client raises: that differs by version
        raise Unresolved(
            f"{asked} can't be asked for the revision of {source.dataset} ({type(error).__name__}): "
            "give `revision` a full commit hash to plan without it"
        ) from error
    assert found.sha is not None
    return found.sha


def read_hugging_face(source: HuggingFaceSource, listed: Listed) -> Iterator[Record]:
    """The rows of a data set, streamed, until ``max_rows`` or ``max_bytes``."""
    size = 0
    for row, value in enumerate(rows_of(source, listed)):
        if row == source.max_rows or (source.max_bytes and size >= source.max_bytes):
            return
        record = pick(row, value, source.text_field)
        if isinstance(record, Text):
            size += len(record.text.encode())
        yield record


def rows_of(source: HuggingFaceSource, listed: Listed) -> Iterator[dict[str, Any]]:
    """The data set's rows through `datasets`, without copying it to this machine."""
    import datasets

    kind, _, pinned = listed.version.partition(":")
    if kind == "sha256" and list_folder(listed.name, Path(listed.location)) != listed:
        raise UserError(f"{listed.location} changed since the run was planned; run again")
    revision = pinned.rpartition("@")[2] if kind == "commit" else None
    try:
        data = datasets.load_dataset(
            listed.location, source.config, split=source.split, revision=revision, streaming=True
        )
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"source {source.name}: {str(error).splitlines()[0]}") from error
    yield from data
