"""Data sets of the Hugging Face Hub, or local folders that `datasets` loads, read by streaming.

A data set is pinned by its commit, a local folder by its files' hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.context import Unresolved, UserError
from data_pipeline.documents import first_line
from data_pipeline.readers import Record, Text, pick
from data_pipeline.sources import HuggingFaceSource, Listed, pin, walk


def list_hugging_face(source: HuggingFaceSource, timeout: float) -> tuple[Listed, ...]:
    """A data set as one listed item, pinned to a commit, or to its files' hashes where it is a local folder.

    Raises:
        Unresolved: the Hub can't be reached (or `HF_HUB_OFFLINE` is set) and ``revision`` is no full commit.
        UserError: the Hub has no such data set or revision.
    """
    name = f"{source.config}/{source.split}" if source.config else source.split
    folder = Path(source.dataset).expanduser()
    if folder.is_dir():
        return (list_folder(name, folder.absolute()),)
    commit = (
        source.revision
        if re.fullmatch(r"[0-9a-f]{40}", source.revision or "")
        else hub_commit(source, timeout)
    )
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


def hub_commit(source: HuggingFaceSource, timeout: float) -> str:
    """The commit that ``source.revision`` (default: the main branch) stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"source {source.name}: the Hugging Face Hub"
    try:
        found = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=timeout)
    except HFValidationError as error:
        raise UserError(
            f"source {source.name}: {source.dataset} is no folder here and no name of a data set"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {source.revision}" if source.revision else ""
        raise UserError(f"{asked} has no data set {source.dataset}{at} that you may read") from error
    except Exception as error:  # offline, or what the Hub's HTTP client raises, which differs by version
        raise Unresolved(
            f"{asked} can't be asked for the revision of {source.dataset} ({type(error).__name__}): "
            "give `revision` a full commit hash to plan without it"
        ) from error
    assert found.sha is not None
    return found.sha


def read_hugging_face(source: HuggingFaceSource, listed: Listed) -> Iterator[Record]:
    """The rows of a data set, streamed, until ``max_rows`` or ``max_bytes``.

    Raises:
        UserError: it is not what was planned, or `datasets` can't read it as the recipe says.
        ConnectionError: the Hub can't be reached, or no longer.
    """
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
    kind, _, pinned = listed.version.partition(":")
    if kind == "sha256" and list_folder(listed.name, Path(listed.location)) != listed:
        raise UserError(f"{listed.location} changed since the run was planned; run again")
    rows = 0
    try:
        for value in stream(source, listed.location, pinned.rpartition("@")[2] if kind == "commit" else None):
            yield value
            rows += 1
    except UserError:
        raise
    except Exception as error:  # of `datasets`, its file systems and HTTP clients: they have no common base
        raise explained(source, error, rows) from error


def stream(source: HuggingFaceSource, location: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """Rows as `datasets` streams them: of column formats only the text column is read."""
    import datasets

    builder = datasets.load_dataset_builder(location, source.config, revision=revision)
    known = builder.info.features
    if known is not None and source.text_field not in known:
        raise UserError(
            f"source {source.name}: {source.dataset} has no column {source.text_field!r} among "
            f"{list(known)[:8]}; set text_field"
        )
    options = {"columns": [source.text_field]} if hasattr(builder.config, "columns") else {}
    yield from datasets.load_dataset(
        location, source.config, split=source.split, revision=revision, streaming=True, **options
    )


def explained(source: HuggingFaceSource, error: Exception, rows: int) -> Exception:
    """What a fault after ``rows`` rows means: a mistake in recipe or data, or a network that may come back."""
    what = (
        f"source {source.name}: can't read the data set {source.dataset} beyond {rows} rows "
        f"({type(error).__name__}: {first_line(error)})"
    )
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if refused or isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError):
        return UserError(f"{what}: check dataset, config, split, text_field and that you may read it")
    return ConnectionError(f"{what}: run again when the network is back")
