"""Names that deployments and runs share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FLOW = "pipeline"


def is_made_up(name: str) -> bool:
    """Whether a flow run's name is one that Prefect makes up where nobody types one: an adjective and an animal."""
    from coolname.data import config

    vocabulary: Mapping[str, Any] = config
    lists = [one.get("words") or one.get("phrases") or [] for one in vocabulary.values()]
    known = {word for words in lists for entry in words for word in flat(entry)}
    return "-" in name and set(name.split("-")) <= known


def flat(entry: Any) -> Iterator[str]:
    """The words of an entry of a list of words, or of phrases."""
    yield from entry.split() if isinstance(entry, str) else entry
