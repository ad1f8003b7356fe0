"""Files by HTTP(S), pinned by their expected hash or the server's ETag or Last-Modified.

A cut transfer resumes where it stopped. What may pass (a lost connection, a busy server) is tried again, after the
wait that the server asks for, if any.
"""

from __future__ import annotations

import logging
import netrc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.core.files import file_sha256
from data_pipeline.download.formats import split_suffix
from data_pipeline.download.sources import HttpSource, Listed, url_name
from data_pipeline.download.transfer import (
    ATTEMPTS,
    Fetching,
    Mismatch,
    Stopped,
    Transient,
    check,
    retried,
    size_of,
    turn,
    wait_until,
)

NO_HEAD = (403, 405, 501)
"""Answers of a server that knows GET only, or of one whose signed addresses are for GET."""

logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs addresses, and their queries may hold keys


def list_http(source: HttpSource, timeout: float, connections: int) -> tuple[Listed, ...]:
    """List the files of an HTTP source; those with an expected hash need no network for this.

    Raises:
        Unresolved: the server can't be reached.
        UserError: the server refuses, or sends nothing by which the file could be pinned.
    """
    with client(timeout) as session, ThreadPoolExecutor(connections) as pool:
        return tuple(pool.map(lambda url: list_url(session, source, url), source.urls))


def list_url(session: httpx.Client, source: HttpSource, url: str) -> Listed:
    name = url_name(url)
    if url in source.sha256:
        return Listed(name=name, size=0, version=f"sha256:{source.sha256[url]}", location=url)
    try:
        response = retried(lambda: ask(session, url))
    except Transient as fault:
        raise Unresolved(f"source {source.name}: {name} {fault}") from fault
    except httpx.TooManyRedirects as error:
        raise UserError(f"source {source.name}: {name} redirects without end: check the address") from error
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


def ask(session: httpx.Client, url: str) -> httpx.Response:
    """Ask the server about a file, without its content.

    Raises:
        Transient: it can't be reached, or is busy.
    """
    try:
        response = session.head(url)
        if response.status_code in NO_HEAD:
            with session.stream("GET", url) as response:
                pass
    except httpx.TransportError as error:
        raise lost(error) from error
    refuse_if_busy(response)
    return response


def lost(error: httpx.TransportError) -> Transient:
    """Describe a fault of the connection in words that follow "the server"."""
    never = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    return Transient(f"{'can not be reached' if never else 'broke off'}: {error or type(error).__name__}")


def refuse_if_busy(response: httpx.Response) -> None:
    """Raise `Transient` where a server may answer otherwise later, with the wait that it asks for."""
    status = response.status_code
    if status >= 500 or status in (408, 425, 429):
        raise Transient(f"answers {status}", retry_after(response.headers.get("retry-after", "")))


def retry_after(value: str) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for: it holds them, or a date (RFC 9110, 10.2.3)."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return wait_until(parsedate_to_datetime(value).timestamp())
    except (ValueError, OverflowError):
        return None


def client(timeout: float) -> httpx.Client:
    """Make a client that takes passwords from ~/.netrc and content as it is stored.

    Raises:
        UserError: ~/.netrc can't be read.
    """
    try:
        auth: httpx.Auth | None = httpx.NetRCAuth()
    except FileNotFoundError:
        auth = None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:  # some hold what stands there
        where = f" (line {error.lineno})" if isinstance(error, netrc.NetrcParseError) else ""
        raise UserError(
            f"~/.netrc can't be read{where}: see that its form and its permissions are right"
        ) from None
    headers = {"accept-encoding": "identity"}
    return httpx.Client(auth=auth, headers=headers, timeout=timeout, follow_redirects=True)


def version_of(response: httpx.Response) -> str | None:
    """Return the content's version as the server sends it, None where it sends none."""
    for header in ("etag", "last-modified"):
        if header in response.headers:
            return f"{header}:{response.headers[header]}"
    return None


def fetch_http(listed: Listed, target: Path, fetching: Fetching) -> None:
    """Bring a listed file to ``target``, and check version, size and hash (if known).

    What an earlier call left in ``target`` is completed by a Range request. If the whole then has another hash than
    the recipe expects, it is fetched once more from its start.

    Raises:
        UserError: it isn't what was listed.
        ConnectionError: several attempts in a row brought nothing new.
        Stopped: ``fetching.stop`` was set.
    """
    resumed = size_of(target) > 0
    if resumed and listed.version == f"sha256:{file_sha256(target)}":
        return  # its size may not be known, so this alone shows that it is whole
    with client(fetching.timeout) as session:
        try:
            complete(listed, target, fetching, lambda: transfer(session, listed, target, fetching))
            check(listed, target)
        except Mismatch:
            if not resumed:
                raise
            complete(listed, target, fetching, lambda: transfer(session, listed, target, fetching))
            check(listed, target)


def complete(listed: Listed, target: Path, fetching: Fetching, attempt: Callable[[], None]) -> None:
    """Make attempts until one brings the file to its end."""

    def in_turn() -> None:
        with turn(urlsplit(listed.location).netloc, fetching):
            attempt()

    try:
        retried(in_turn, lambda: size_of(target), fetching.stop)
    except httpx.TooManyRedirects as error:
        raise UserError(f"can't fetch {listed.name}: it redirects without end") from error
    except Transient as fault:
        raise ConnectionError(
            f"can't fetch {listed.name}: the server {fault} ({ATTEMPTS} attempts); run again to resume"
        ) from fault


def transfer(session: httpx.Client, listed: Listed, target: Path, fetching: Fetching) -> None:
    """Make one request for what ``target`` lacks.

    Raises:
        Transient: the server is busy, or ended early.
        UserError: it refuses, or has another version.
    """
    have = size_of(target)
    if have and have == listed.size:
        return
    try:
        with session.stream("GET", listed.location, headers=range_headers(listed, have)) as response:
            refuse_if_busy(response)
            if response.status_code == 416:
                target.unlink()
                raise Transient("has fewer bytes than it announced")
            if response.is_error:
                raise UserError(f"can't fetch {listed.name}: the server answers {response.status_code}")
            refuse_if_other(response, listed, target)
            with open(target, "ab" if continues(response, have) else "wb") as file:
                for chunk in response.iter_raw():  # no chunk size: it would hold back what a cut then loses
                    if fetching.stop.is_set():
                        raise Stopped
                    file.write(chunk)
    except httpx.TransportError as error:
        raise lost(error) from error


def range_headers(listed: Listed, have: int) -> dict[str, str]:
    """Return headers that ask for what follows the first ``have`` bytes, if the content is still the same."""
    if not have:
        return {}
    headers = {"range": f"bytes={have}-"}
    kind, _, version = listed.version.partition(":")
    # A weak ETag does not stand for single bytes, and may not be sent (RFC 9110, 13.1.5).
    if kind == "last-modified" or (kind == "etag" and not version.startswith("W/")):
        headers["if-range"] = version
    return headers


def refuse_if_other(response: httpx.Response, listed: Listed, target: Path) -> None:
    """Raise UserError where the server sends something else than what was listed."""
    if not listed.version.startswith("sha256:") and version_of(response) != listed.version:
        target.unlink(missing_ok=True)
        raise UserError(f"{listed.name} changed since the run was planned; run again")
    encoding = response.headers.get("content-encoding", "identity").lower()
    if (
        encoding != "identity" and not split_suffix(listed.name)[1]
    ):  # some send that for what is stored as .gz
        raise UserError(
            f"can't fetch {listed.name}: the server sends it as {encoding}, though asked for it as it is"
        )


def continues(response: httpx.Response, have: int) -> bool:
    """Return whether the content begins after the first ``have`` bytes, and not at the start.

    Raises:
        Transient: it begins elsewhere.
    """
    if response.status_code != 206:
        return False
    found = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    if found and int(found[1]) != have:
        raise Transient(f"sends bytes from {found[1]} on, asked for those from {have} on")
    return True
