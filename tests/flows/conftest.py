"""Fixtures of several files here."""

from __future__ import annotations

from made_up_scores import files, score  # noqa: F401 (fixtures)
