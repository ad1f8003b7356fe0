"""Data sets of the Hugging Face Hub, or local folders that `datasets` loads, read by streaming.

A data set is pinned by its commit, a local folder by its files' hashes. Its shards (mostly files) are read side by
side, and each resumes at the row where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.core.text import first_line
from data_pipeline.download.local import pin, walk
from data_pipeline.download.records import Record, Rejected, Text, pick
from data_pipeline.download.redaction import without_secrets
from data_pipeline.download.sources import HuggingFaceSource, Listed
from data_pipeline.download.streams import Limit


def list_hugging_face(source: HuggingFaceSource, timeout: float) -> tuple[Listed, ...]:
    """Return a data set as one listed item, pinned to a commit, or to its files' hashes where it is a local folder.

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
    """List a local data set folder as one listed item."""
    paths = (Path(here, file) for here, _, files in walk(folder) for file in files)
    files = pin((path.relative_to(folder).as_posix(), path) for path in paths)
    if not files:
        raise UserError(f"the data set folder {folder} is empty")
    canonical = json.dumps([[one.name, one.size, one.version] for one in files], allow_nan=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Listed(
        name=name, size=sum(one.size for one in files), version=f"sha256:{digest}", location=str(folder)
    )


def hub_commit(source: HuggingFaceSource, timeout: float) -> str:
    """Return the commit that ``source.revision`` (default: the main branch) stands for now."""
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


@dataclass
class Position:
    """Position in a data set: after ``row`` rows of shard ``shard``."""

    shard: int
    row: int = 0
    rows: int = 0
    """Read since the beginning, of all shards."""
    size: int = 0
    """Bytes of text since the beginning."""
    state: dict[str, Any] | None = None
    """The shard's own state (`IterableDataset.state_dict`); None where it is at its start."""


def shards_of(source: HuggingFaceSource, listed: Listed) -> int:
    """Count the shards (mostly files) of which the split consists. They can be read side by side, unless reading is
    to end somewhere (``max_rows``, ``max_bytes``).

    Raises:
        UserError, ConnectionError: as `HubRows`.
    """
    check_folder(listed)
    with explaining(source, lambda: 0):
        return int(split_of(source, listed).num_shards)


class HubRows:
    """The rows of some shards of a data set, streamed, until ``max_rows`` or ``max_bytes``.

    Iteration gives (shard, record). `position` is where it stands, as JSON; another `HubRows` resumes from there.

    Raises:
        UserError: it is not what was planned, or `datasets` can't read it as the recipe asks.
        ConnectionError: the Hub can't be reached, or no longer.
    """

    def __init__(
        self, source: HuggingFaceSource, listed: Listed, first: int, end: int, position: dict[str, Any] | None
    ) -> None:
        self._source, self._listed, self._end = source, listed, end
        self._position = Position(**position) if position else Position(first)
        self._reading: Any = None
        self._limit = Limit(listed.size, source.max_expansion, sys.maxsize) if listed.size else None

    def position(self) -> dict[str, Any]:
        if self._reading is not None:
            self._position.state = self._reading.state_dict()
        return asdict(self._position)

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        source, position = self._source, self._position
        with explaining(source, lambda: position.rows):
            split = split_of(source, self._listed)
            while position.shard < self._end:
                # One of one is the whole: some data sets can't be split.
                count = split.num_shards
                shard = split if count == 1 else split.shard(num_shards=count, index=position.shard)
                if position.state is not None:
                    shard.load_state_dict(position.state)
                self._reading = shard
                for value in shard:
                    if self._full():
                        return
                    record = pick(position.row, value, source.text_field, source.meta_fields)
                    position.row += 1
                    position.rows += 1
                    position.size += record.size if isinstance(record, Text) else 0
                    if self._limit and position.size > self._limit.most:
                        yield position.shard, Rejected(None, "expands_too_far", self._limit.explanation)
                        return
                    yield position.shard, record
                self._reading = None
                position.shard, position.row, position.state = position.shard + 1, 0, None

    def _full(self) -> bool:
        source, position = self._source, self._position
        full = position.rows == source.max_rows or (source.max_bytes and position.size >= source.max_bytes)
        return bool(full)


def check_folder(listed: Listed) -> None:
    """Make sure that a local data set is what it was when the run was planned."""
    if listed.version.startswith("sha256:") and list_folder(listed.name, Path(listed.location)) != listed:
        raise UserError(f"{listed.location} changed since the run was planned; run again")


@contextmanager
def explaining(source: HuggingFaceSource, rows: Callable[[], int]) -> Iterator[None]:
    """Raise faults of `datasets`, its file systems or HTTP clients as `explained`; they have no common base."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise explained(source, error, rows()) from None  # addresses in its trace may be signed


def split_of(source: HuggingFaceSource, listed: Listed) -> Any:
    """Return the split as `datasets` streams it: of column formats only the columns that are kept are read."""
    import datasets

    kind, _, pinned = listed.version.partition(":")
    revision = pinned.rpartition("@")[2] if kind == "commit" else None
    if kind != "commit" and any(Path(listed.location, name).is_file() for name in SAVED):
        return saved_split(source, listed.location)
    builder = datasets.load_dataset_builder(listed.location, source.config, revision=revision)
    wanted = columns_of(source, builder.info.features)
    options = {"columns": wanted} if hasattr(builder.config, "columns") else {}
    return datasets.load_dataset(
        listed.location, source.config, split=source.split, revision=revision, streaming=True, **options
    )


SAVED = ("state.json", "dataset_dict.json")
"""Files of which `save_to_disk` of `datasets` writes one."""


def saved_split(source: HuggingFaceSource, folder: str) -> Any:
    """Return the split of a folder that `save_to_disk` wrote, as a stream of as many shards as it has files."""
    import datasets

    saved = datasets.load_from_disk(folder)
    splits = (
        dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or source.split): saved}
    )
    if source.split not in splits:
        raise UserError(
            f"source {source.name}: {source.dataset} has no split {source.split!r} among {list(splits)}"
        )
    split = splits[source.split]
    split = split.select_columns(columns_of(source, split.features))
    return split.to_iterable_dataset(num_shards=max(1, min(len(split), len(split.cache_files))))


def columns_of(source: HuggingFaceSource, known: Mapping[str, Any] | None) -> list[str]:
    """Return the columns that hold what is kept, among those that are ``known``; None: it isn't known which there are.

    Raises:
        UserError: one is not there.
    """
    columns = []
    for name in dict.fromkeys([source.text_field, *source.meta_fields]):
        column = name if known is None or name in known else column_above(name, known)
        if column is None:
            key = "text_field" if name == source.text_field else "meta_fields"
            raise UserError(
                f"source {source.name}: {source.dataset} has no column {name!r} among "
                f"{list(known or ())[:8]}; set {key}"
            )
        columns.append(column)
    return list(dict.fromkeys(columns))


def column_above(path: str, known: Mapping[str, Any]) -> str | None:
    """Return the column that a dotted path leads into; None if there is none."""
    while "." in path:
        path = path.rpartition(".")[0]
        if path in known:
            return path
    return None


def explained(source: HuggingFaceSource, error: Exception, rows: int) -> Exception:
    """Return what a fault after ``rows`` rows means: a mistake in recipe or data, or a network that may come back."""
    what = (
        f"source {source.name}: can't read the data set {source.dataset} beyond {rows} rows "
        f"({type(error).__name__}: {without_secrets(first_line(error))})"
    )
    if names := re.search(r"available configs: (\[.*\])", str(error)):
        return UserError(
            f"source {source.name}: the data set {source.dataset} has several configs: set config to one of {names[1]}"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if refused or isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError):
        return UserError(
            f"{what}: check dataset, config, split, text_field, meta_fields and that you may read it"
        )
    return ConnectionError(f"{what}: run again when the network is back")
