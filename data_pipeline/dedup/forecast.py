"""Forecast of what ``dedup`` will need, from the number of documents and their bytes: arithmetic, no measurement."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.core.text import human_bytes
from data_pipeline.dedup.candidates import Search

MB_PER_CORE = 70.0
"""Text a second that a core takes from documents in to documents out: nominal, as measured on Python sources."""
SECONDS_A_DOCUMENT = 15e-6
"""Seconds of one core a document, besides; this is what short documents cost."""
LIBRARIES = 250 * 10**6
"""Bytes of memory that Python with its libraries takes."""
OPEN_SHARE = 0.1
"""Fraction of the text in documents whose shingle sets are written, as in a corpus of source code."""
BYTES_A_DOCUMENT = 2 * 16 + 2 * 12 + 16 + 60 + 8 + 17 + 24 + 8 + 1
"""Bytes on disk, besides signature and bands: digest and its entry, numbers, id, and what is decided."""
RESIDENT_A_DOCUMENT = 8 + 17 + 17 + 8 + 1
"""Bytes of these that the deciding process maps into memory."""


@dataclass(frozen=True)
class Forecast:
    """Needs of a run."""

    disk: float
    """Bytes of scratch, besides the output."""
    worker_memory: float
    """Bytes a worker, at most, besides the texts and signatures of the shard it reads."""
    driver_memory: float
    """Bytes in the process that runs the stage; most are mapped files, which the system may take back."""
    partitions: int
    """Partitions of the band hashes: tasks that search for candidates."""
    seconds: float
    workers: int

    def lines(self) -> list[str]:
        """Return lines for a person."""
        worker, driver = human_bytes(self.worker_memory), human_bytes(self.driver_memory)
        partitions = f"{self.partitions} partition" + "s" * (self.partitions > 1)
        return [
            f"{human_bytes(self.disk)} of scratch on disk, {partitions} of band hashes",
            f"memory: {worker} a worker, {driver} to decide, most of it mapped files",
            f"about {max(self.seconds, 1):,.0f} s on {self.workers} cores at a nominal {MB_PER_CORE:.0f} MB/s a core",
        ]


def forecast(search: Search, documents: float, text_bytes: float, workers: int) -> Forecast:
    """Forecast what ``documents`` of ``text_bytes`` in all need, for a search of kind ``near``."""
    signature = search.bands * (2 * search.rows + 12)
    return Forecast(
        disk=documents * (BYTES_A_DOCUMENT + signature) + OPEN_SHARE * text_bytes,
        worker_memory=LIBRARIES + search.memory,
        driver_memory=LIBRARIES + documents * RESIDENT_A_DOCUMENT,
        partitions=search.partitions(documents),
        seconds=(text_bytes / (MB_PER_CORE * 1e6) + documents * SECONDS_A_DOCUMENT) / workers,
        workers=workers,
    )
