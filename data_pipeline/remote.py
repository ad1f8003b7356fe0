"""Files by HTTP(S), pinned by their expected hash or the server's ETag or Last-Modified.

A cut transfer goes on where it stopped. What may pass (a lost connection, a busy server) is tried again.
"""

from __future__ import annotations

import time
from pathlib import Path, PurePath

import httpx

from data_pipeline.context import Unresolved, UserError
from data_pipeline.documents import file_sha256
from data_pipeline.sources import HttpSource, Listed, url_name

ATTEMPTS = 5
"""Consecutive attempts that bring nothing new, before a transfer is given up."""
BACKOFF_SECONDS = 0.5
"""Wait before the second attempt; doubled for each that follows."""

NO_HEAD = (405, 501)
"""Answers of a server that knows GET only."""


class Transient(Exception):
    """A fault of the network or the server that may pass."""


def list_http(source: HttpSource, timeout: float) -> tuple[Listed, ...]:
    """The files of an HTTP source; those with an expected hash need no network for this.

    Raises:
        Unresolved: the server can't be reached.
        UserError: the server refuses, or says nothing by which the file could be pinned.
    """
    with client(timeout) as session:
        return tuple(list_url(session, source, url) for url in source.urls)


def list_url(session: httpx.Client, source: HttpSource, url: str) -> Listed:
    name = url_name(url)
    if url in source.sha256:
        return Listed(name=name, size=0, version=f"sha256:{source.sha256[url]}", location=url)
    response = ask(session, source, url)
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


def ask(session: httpx.Client, source: HttpSource, url: str) -> httpx.Response:
    """What the server says of a file, without its content.

    Raises:
        Unresolved: it can't be reached, or is busy, at every one of `ATTEMPTS`.
        UserError: it redirects without end.
    """
    name = url_name(url)
    cause: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            response = session.head(url)
            if response.status_code in NO_HEAD:
                with session.stream("GET", url) as response:
                    pass
        except httpx.TransportError as error:
            fault, cause = Unresolved(f"source {source.name}: can't reach {name}: {error}"), error
            continue
        except httpx.TooManyRedirects as error:
            raise UserError(
                f"source {source.name}: {name} redirects without end: check the address"
            ) from error
        if not busy(response):
            return response
        fault, cause = Unresolved(f"source {source.name}: {name} answers {response.status_code}"), None
    raise fault from cause


def busy(response: httpx.Response) -> bool:
    """Whether a server may answer otherwise later."""
    return response.status_code >= 500 or response.status_code in (408, 429)


def client(timeout: float) -> httpx.Client:
    """A client that takes passwords from ~/.netrc and content as it is stored."""
    try:
        auth: httpx.Auth | None = httpx.NetRCAuth()
    except FileNotFoundError:
        auth = None
    headers = {"accept-encoding": "identity"}
    return httpx.Client(auth=auth, headers=headers, timeout=timeout, follow_redirects=True)


def version_of(response: httpx.Response) -> str | None:
    """What the server says of the content's version."""
    for header in ("etag", "last-modified"):
        if header in response.headers:
            return f"{header}:{response.headers[header]}"
    return None


def fetch(listed: Listed, folder: Path, timeout: float) -> Path:
    """Bring a listed file into ``folder``, which no other worker uses, and check version, size and hash (if known).

    A part that an earlier call left is completed by a Range request.

    Raises:
        UserError: it isn't what was listed.
        ConnectionError: `ATTEMPTS` attempts in a row brought nothing new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"fetched{''.join(PurePath(listed.name).suffixes[-2:])}"
    fruitless = 0
    with client(timeout) as session:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                transfer(session, listed, part)
                break
            except httpx.TooManyRedirects as error:
                raise UserError(f"can't fetch {listed.name}: it redirects without end") from error
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
    kind, _, version = listed.version.partition(":")
    if have and kind == "etag" and not version.startswith("W/"):  # a weak one says nothing of single bytes
        headers["if-range"] = version
    with session.stream("GET", listed.location, headers=headers) as response:
        status = response.status_code
        if status == 416:  # we hold more than there is
            part.unlink()
            raise Transient("the part on disk was longer than the file")
        if busy(response):
            raise Transient(f"the server answers {status}")
        if response.is_error:
            raise UserError(f"can't fetch {listed.name}: the server answers {status}")
        if kind != "sha256" and version_of(response) != listed.version:
            part.unlink(missing_ok=True)
            raise UserError(f"{listed.name} changed since the run was planned; run again")
        with open(part, "ab" if status == 206 else "wb") as file:
            for chunk in response.iter_raw():  # no chunk size: it would hold back what a cut then loses
                file.write(chunk)


def check(listed: Listed, path: Path) -> None:
    """Make sure that what was fetched is what was listed."""
    size = path.stat().st_size
    if listed.size and size != listed.size:
        path.unlink()
        raise UserError(f"{listed.name}: {size} bytes came, {listed.size} were announced; run again")
    kind, _, expected = listed.version.partition(":")
    if kind == "sha256":
        found = file_sha256(path)
        if found != expected:
            path.unlink()
            raise UserError(f"{listed.name}: its sha256 is {found}, the recipe expects {expected}")
