"""Files of object stores (S3, Google Cloud Storage, Azure, ...) through `fsspec`, pinned by ETag or time and size.

Drivers find credentials and endpoints by themselves; none passes through here. A fetch is made of blocks, so a cut
one resumes with the block where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.core.text import first_line
from data_pipeline.download.archives import printable
from data_pipeline.download.formats import has_known_suffix, known_suffixes, suffix_of
from data_pipeline.download.redaction import without_secrets
from data_pipeline.download.sources import Listed, Listing, ObjectSource
from data_pipeline.download.transfer import Fetching, Stopped, Transient, check, retried, size_of

BLOCK_BYTES = 1 << 23
MAGIC = "*?["
VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "checksum")
TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
EXTRAS = {"s3": "s3", "s3a": "s3"}
DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
MISTAKES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)


def file_system(url: str) -> tuple[Any, str]:
    """Return the `fsspec` file system of an address, and the path within.

    Raises:
        UserError: its driver is not installed, or there is none.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = f"'llmill[{EXTRAS[scheme]}]'" if scheme in EXTRAS else DRIVERS.get(scheme, "its driver")
        raise UserError(f"{scheme}:// needs a driver: pip install {package} ({first_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{scheme}:// is not known to fsspec ({first_line(error)})") from error


def list_objects(source: ObjectSource) -> Listing:
    """Return the files of an object source, sorted by name; the others are counted.

    Raises:
        UserError: there is none that can be read, or they can't be explanation from later versions.
        Unresolved: the store can't be reached.
    """
    store, path = file_system(source.url)
    try:
        store.invalidate_cache()
        found = find(store, path)
    except Exception as error:  # drivers' faults have no common base, and their traces may hold secrets
        raise explained(f"source {source.name}: can't list {source.url}", error, Unresolved) from None
    root = fixed_part(path) if any(sign in path for sign in MAGIC) or path not in found else parent(path)
    names = {one.removeprefix(root).removeprefix("/"): one for one in found}  # "a//b" is another than "a/b"
    readable, left_out = readable_of(source, names)
    if not readable:
        raise UserError(
            f"source {source.name}: nothing to read at {source.url} ({len(found)} files, none ending with "
            f"{known_suffixes()}; `format` sets that of others)"
        )
    listing: list[Listed] = []
    total = 0
    for name in readable:
        if source.max_bytes is not None and total >= source.max_bytes:
            break
        listing.append(pinned(source, store, name, found[names[name]]))
        total += listing[-1].size
    return Listing(tuple(listing), left_out)


def readable_of(source: ObjectSource, names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the names of files that are read, sorted, and how many are not."""
    readable, left_out = [], Counter[str]()
    for name in sorted(names):
        if hidden(name):
            left_out["hidden"] += 1
        elif has_known_suffix(name, source.format):
            readable.append(name)
        elif not name.endswith("/"):  # the mark of a folder
            left_out[suffix_of(name)] += 1
    return readable, left_out


def find(store: Any, path: str) -> dict[str, Mapping[str, Any]]:
    """Return what a store has on each file at ``path``: one, all below a folder, or those that match a pattern."""
    magic = any(sign in path for sign in MAGIC)
    found = store.glob(path, detail=True) if magic else store.find(path, detail=True)  # of a file: itself
    return {name: about for name, about in found.items() if about["type"] == "file"}


def fixed_part(path: str) -> str:
    """Return the folder above the first component of ``path`` that is a pattern."""
    parts = path.rstrip("/").split("/")
    magic = (n for n, part in enumerate(parts) if any(sign in part for sign in MAGIC))
    return "/".join(parts[: next(magic, len(parts))])


def parent(path: str) -> str:
    return path.rpartition("/")[0]


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def pinned(source: ObjectSource, store: Any, name: str, about: Mapping[str, Any]) -> Listed:
    version = version_of(about)
    if version is None:
        raise UserError(
            f"source {source.name}: {name} has neither ETag nor time, so a change would go unnoticed; "
            "copy it to a folder and use `kind: local`"
        )
    location = store.unstrip_protocol(about["name"])
    return Listed(name=printable(name), size=int(about["size"] or 0), version=version, location=location)


def version_of(about: Mapping[str, Any]) -> str | None:
    """Return a file's version as its store has it, None where it has none."""
    for key in VERSION_KEYS:
        if about.get(key):
            return f"etag:{about[key]}"
    for key in TIME_KEYS:
        if about.get(key):
            time = about[key]
            return f"last-modified:{time.isoformat() if hasattr(time, 'isoformat') else time}"
    return None


def fetch_object(listed: Listed, target: Path, fetching: Fetching) -> None:
    """Bring a listed file to ``target`` and check its version and size; what ``target`` holds already is kept.

    Raises:
        UserError: it isn't what was listed, or may not be read.
        ConnectionError: several attempts in a row brought nothing new.
        Stopped: ``fetching.stop`` was set.
    """
    store, path = file_system(listed.location)

    def transfer() -> None:
        try:
            refuse_if_other(store, path, listed)
            with open(target, "ab") as file:
                while (have := size_of(target)) < listed.size:
                    if fetching.stop.is_set():
                        raise Stopped
                    block = store.cat_file(path, start=have, end=min(listed.size, have + BLOCK_BYTES))
                    if not block:
                        raise EOFError(f"nothing follows byte {have} of {listed.size}")
                    file.write(block)
                    file.flush()
            refuse_if_other(store, path, listed)
        except (Stopped, UserError):
            raise
        except Exception as error:
            explanation = explained(f"can't fetch {listed.name}", error, ConnectionError)
            raise (
                Transient(str(explanation)) if isinstance(explanation, ConnectionError) else explanation
            ) from None

    try:
        retried(transfer, lambda: size_of(target), fetching.stop)
    except Transient as fault:
        raise ConnectionError(f"{fault}; run again to resume") from fault
    check(listed, target)


def refuse_if_other(store: Any, path: str, listed: Listed) -> None:
    """Raise UserError where the store holds another version than what was listed."""
    store.invalidate_cache(path)
    store.invalidate_cache(parent(path))
    about = store.info(path)
    if version_of(about) != listed.version or int(about["size"] or 0) != listed.size:
        raise UserError(f"{listed.name} changed since the run was planned; run again")


def explained(what: str, error: Exception, passing: type[Exception]) -> Exception:
    """Return a driver's fault as a mistake to mend, or as one that may pass (``passing``), with no secret in it."""
    explanation = f"{what} ({type(error).__name__}: {without_secrets(first_line(error))})"
    if isinstance(error, MISTAKES) or "Credentials" in type(error).__name__:
        return UserError(f"{explanation}: check the address, and the credentials in the environment")
    return passing(explanation)
