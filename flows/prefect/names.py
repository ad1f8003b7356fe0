"""Names that deployments and runs share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

FLOW = "pipeline"
GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"),
    *("nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
)
ADJECTIVES = (
    *("Awesome", "Rustic", "Small", "Gorgeous", "Fantastic", "Sleek", "Intelligent", "Unbranded", "Refined"),
    *("Licensed", "Generic", "Practical", "Ergonomic", "Handcrafted", "Tasty", "Handmade", "Incredible"),
)
OF_FORMS = re.compile(rf"(?:{'|'.join(GREEK)})\d+(?:-[a-z]+)+|(?:{'|'.join(ADJECTIVES)})-[A-Z][\w '-]{{1,5}}")
"""Names that the forms of Prefect's pages begin with: stars (the older pages), or products and animals."""


def is_made_up(name: str) -> bool:
    """Whether a flow run's name is one that Prefect makes up where nobody types one: an adjective and an animal, or
    what its forms begin with. Of stars, those without a number are taken for a person's."""
    if OF_FORMS.fullmatch(name):
        return True
    from coolname.data import config

    vocabulary: Mapping[str, Any] = config
    lists = [one.get("words") or one.get("phrases") or [] for one in vocabulary.values()]
    known = {word for words in lists for entry in words for word in flat(entry)}
    return "-" in name and set(name.split("-")) <= known


def flat(entry: Any) -> Iterator[str]:
    """The words of an entry of a list of words, or of phrases."""
    yield from entry.split() if isinstance(entry, str) else entry
