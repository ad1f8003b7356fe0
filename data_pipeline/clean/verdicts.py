"""Verdicts on each document of a batch: kept, or dropped for the first reason that is found."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

KEPT = "kept"


class Verdicts:
    """One verdict a row. The first reason stands; what is dropped is asked nothing more."""

    def __init__(self, rows: int) -> None:
        self.reasons = [KEPT]
        """Meaning of each of `codes`."""
        self.codes = np.zeros(rows, np.int16)
        self.evidence: dict[int, str] = {}
        """Evidence by row: what was found, where a reason alone does not show it."""

    def alive(self) -> NDArray[np.int64]:
        """Return the rows that nothing has dropped so far."""
        return np.flatnonzero(self.codes == 0)

    def reason(self, row: int) -> str:
        return self.reasons[self.codes[row]]

    def drop(self, broken: NDArray[np.bool_], reason: str, rows: NDArray[np.int64] | None = None) -> None:
        """Drop where ``broken`` is True; it has a value for each row, or for each of ``rows``."""
        found = np.flatnonzero(broken) if rows is None else rows[broken]
        found = found[self.codes[found] == 0]
        if len(found):
            if reason not in self.reasons:
                self.reasons.append(reason)
            self.codes[found] = self.reasons.index(reason)

    def drop_found(self, found: Iterable[tuple[int, str, str]]) -> None:
        """Drop (row, reason, evidence)."""
        for row, reason, evidence in found:
            if not self.codes[row]:
                if reason not in self.reasons:
                    self.reasons.append(reason)
                self.codes[row] = self.reasons.index(reason)
                self.evidence[row] = evidence
