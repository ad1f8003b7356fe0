"""Large local files of lines or row groups, cut into slices that are read side by side.

Where a slice begins follows from the size of the file alone. Ids still count rows from the start of the file: for
that its lines are counted while its hash is checked, once for all slices.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import once
from data_pipeline.download.formats import split_suffix
from data_pipeline.download.sources import Listed, LocalSource, Source

SLICE_BYTES = 1 << 26
BLOCK_BYTES = 1 << 20
PARQUET_SEAM = b"PAR1PAR1"
"""Where one Parquet file ends and another begins."""


@dataclass(frozen=True)
class Slice:
    """The ``index``-th of ``count`` slices of a file."""

    index: int
    count: int
    row: int
    """The number of its first row in the file; 0 for Parquet, which has it itself."""
    stamp: tuple[int, int]
    """Size and time of change (ns) of the file when its hash was checked."""

    def bounds(self, whole: int) -> tuple[int, int]:
        """Return from where to where (without it) this slice reaches in ``whole`` bytes or row groups."""
        return self.index * whole // self.count, (self.index + 1) * whole // self.count


def slice_count(source: Source, listed: Listed, shard_bytes: int) -> int:
    """Return how many slices a file is cut into; 1 where it stays whole."""
    suffix, compression = split_suffix(listed.name)
    if getattr(source, "format", None) == "jsonl":
        suffix, compression = split_suffix(listed.name, "jsonl")
    sliceable = suffix == ".parquet" or (suffix == ".jsonl" and getattr(source, "encoding", "") == "utf-8")
    if not isinstance(source, LocalSource) or compression or not sliceable:
        return 1
    return max(1, listed.size // max(SLICE_BYTES, shard_bytes))


def survey(item: tuple[Listed, int, Path]) -> list[Slice]:
    """Find the slices of a file: (what is listed, how many slices, the marker that keeps the result). One where it
    can't be cut.

    Raises:
        UserError: the file is not what was listed.
    """
    listed, count, marker = item
    kept = once(marker, partial(look_through, listed, count))
    stamp = (kept["stamp"][0], kept["stamp"][1])
    return [
        Slice(index=index, count=len(kept["rows"]), row=row, stamp=stamp)
        for index, row in enumerate(kept["rows"])
    ]


def look_through(listed: Listed, count: int) -> dict[str, Any]:
    """Check a file's hash and find the first row of each of ``count`` slices."""
    by_line = split_suffix(listed.name)[0] != ".parquet"
    bounds = [index * listed.size // count for index in range(count)] if by_line else []
    found = stamp_of(Path(listed.location))
    digest = hashlib.sha256()
    rows: list[int] = []
    start = lines = 0
    last, is_one = b"\n", True
    with open(listed.location, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            counted = 0
            while len(rows) < len(bounds) and bounds[len(rows)] < start + len(block):
                cut = bounds[len(rows)] - start
                lines += block.count(b"\n", counted, cut)
                counted = cut
                begins = (block[cut - 1 : cut] or last[-1:]) == b"\n"
                rows.append(lines + (0 if begins else 1))
            lines += block.count(b"\n", counted) if by_line else 0
            is_one &= by_line or PARQUET_SEAM not in last + block
            start += len(block)
            last = block[-len(PARQUET_SEAM) :]
    if f"sha256:{digest.hexdigest()}" != listed.version:
        raise UserError(f"{listed.location} changed since the run was planned; run again")
    if not (lines if by_line else is_one):  # old line ends, or files that were joined: read as a whole
        return {"stamp": found, "rows": [0]}
    return {"stamp": found, "rows": rows if by_line else [0] * count}


def stamp_of(path: Path) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def check_stamp(path: Path, within: Slice) -> None:
    """Make sure that a file wasn't written to since its hash was checked."""
    if stamp_of(path) != within.stamp:
        raise UserError(f"{path} changed since the run was planned; run again")


def lines_of(stream: BufferedReader, within: Slice) -> int:
    """Go to the first line that begins in a slice; returns the bytes from there to where the last one must begin."""
    first, end = within.bounds(within.stamp[0])
    if first:
        stream.seek(first - 1)
        while (block := stream.readline(BLOCK_BYTES)) and not block.endswith(b"\n"):
            pass
    return end - stream.tell()
