"""Results of a group of files: shards of documents and rejected records, and how far they reach into the group.

Each shard that is whole is noted on disk with the position in the group where it ends. A group that was killed is
resumed from there, and gives the same files as one that was not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from data_pipeline.core.files import atomic_path
from data_pipeline.documents import REJECTED, SCHEMA, ShardWriter, write_shard
from data_pipeline.download.records import Rejected, Text

COUNTS = ("documents", "bytes", "rejected", "passed_over")


@dataclass
class Progress:
    """State of a group after its last whole shard, and what came of it; field names are keys of the file."""

    piece: int = 0
    """The position of the file in its group."""
    place: Any = None
    """The position in this file, as its reader returns it; None: its start."""
    parts: list[tuple[bool, bool]] = field(default_factory=list)
    """Flags of each shard: whether it has documents, and whether it has rejected records."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents by source; so are the following."""
    bytes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected records by source/reason."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Members of archives that were passed over, by source/reason."""

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Read what a killed worker left, or return the beginning."""
        if not path.exists():
            return cls()
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name in COUNTS:
            kept[name] = Counter(kept[name])
        return cls(**kept)


class GroupWriter:
    """Writer of ``<stem>-documents-000.parquet``, ``<stem>-rejected-000.parquet``, ... as ``shard_bytes`` asks for."""

    def __init__(self, stem: Path, shard_bytes: int) -> None:
        self._stem = stem
        self._note = stem.with_name(f"{stem.name}-progress.json")
        self.progress = Progress.read(self._note)
        self._shard_bytes = shard_bytes
        self._filled = 0
        self._open = ExitStack()
        self._writers: dict[str, ShardWriter] = {}

    @property
    def full(self) -> bool:
        """Whether the shard has reached ``shard_bytes``."""
        return self._filled >= self._shard_bytes

    def add(self, id: str, record: Text, source: str, meta: str) -> None:
        """Append a document; ``meta`` is JSON."""
        self._writer("documents").add(id, record.text, source, meta)
        self._filled += record.size
        self.progress.documents[source] += 1
        self.progress.bytes[source] += record.size

    def reject(self, id: str, record: Rejected, source: str) -> None:
        """Append a rejected record."""
        self._writer("rejected").add(id, record.reason, record.detail)
        self.progress.rejected[f"{source}/{record.reason}"] += 1

    def pass_over(self, passed_over: Mapping[str, int], source: str) -> None:
        """Count what was passed over in a file that is read to its end."""
        for key, count in passed_over.items():
            self.progress.passed_over[f"{source}/{key}"] += count

    def _writer(self, kind: str) -> ShardWriter:
        if kind not in self._writers:
            path = shard_path(self._stem, kind, len(self.progress.parts))
            schema = SCHEMA if kind == "documents" else REJECTED
            self._writers[kind] = self._open.enter_context(write_shard(path, schema))
        return self._writers[kind]

    def seal(self, index: int, position: Any) -> None:
        """End the shard here, after ``position`` in input ``index`` of the group, and note that on disk."""
        self._close()
        self.progress.piece, self.progress.place = index, position
        with atomic_path(self._note) as temporary:
            temporary.write_text(json.dumps(vars(self.progress), allow_nan=False), encoding="utf-8")

    def finish(self) -> dict[str, Any]:
        """End the last shard; return what came of the whole group, as JSON."""
        self._close()
        tally = vars(self.progress)
        return {key: tally[key] for key in (*COUNTS, "parts")}

    def _close(self) -> None:
        self._open.close()
        if self._writers:
            self.progress.parts.append(("documents" in self._writers, "rejected" in self._writers))
        self._writers = {}
        self._filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: Any) -> None:
        self._open.__exit__(*fault)


def shard_path(stem: Path, kind: str, number: int) -> Path:
    """Return the file of a shard; ``kind`` is documents or rejected."""
    return stem.with_name(f"{stem.name}-{kind}-{number:03d}.parquet")


def final_paths(scratch: Path, tallies: Sequence[Mapping[str, Any]], out: Path) -> dict[Path, Path]:
    """Return {final path: path of the shard in ``scratch``} for all groups, in order."""
    moves: dict[Path, Path] = {}
    numbers = Counter[str]()
    folders = {"documents": out, "rejected": out / "rejected"}
    for group, tally in enumerate(tallies):
        for number, present in enumerate(tally["parts"]):
            for kind, there in zip(("documents", "rejected"), present, strict=True):
                if there:
                    final = folders[kind] / f"{kind}-{numbers[kind]:05d}.parquet"
                    moves[final] = shard_path(group_stem(scratch, group), kind, number)
                    numbers[kind] += 1
    return moves


def group_stem(scratch: Path, group: int) -> Path:
    """Return what the names of a group's files begin with."""
    return scratch / f"group-{group:05d}"
