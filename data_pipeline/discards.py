"""Records, files, documents and slices of text that a stage discards: their metrics, and how people read these.

A stage names each count ``kind/reason``; `by_reason` makes such metrics. Whoever shows a result (terminal, summary,
plan, status, pages of Prefect and MLflow) asks `describe` for them, so nothing that is discarded goes unseen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.stage import Metrics

MOST_REASONS = 4
"""Named on one line; the others are added up."""
MOST_NAMES = 40
"""Metrics of one kind: the rarer reasons (suffixes of files may be any) share the last of them."""
OTHERS = "others"


@dataclass(frozen=True)
class Kind:
    """One sort of discarding."""

    words: str
    """Stand behind the number."""
    of: str
    """Name of what is counted, where it is a fraction of something."""
    whole: tuple[str, ...] = ()
    """The metrics that, with the discarded where it is not among them, are all of it."""
    included: bool = False
    """Whether ``whole`` holds the discarded, too."""


KINDS: dict[str, Kind] = {
    "left_out": Kind("left out", "files", ("files",)),
    "passed_over": Kind("passed over", "files in archives"),
    "rejected": Kind("rejected", "records", ("documents",)),
    "dropped": Kind("dropped", "documents", ("documents",), included=True),
    "removed": Kind("removed", "documents", ("documents",), included=True),
    "cut": Kind("cut", "pieces"),
    "lines_removed": Kind("lines removed", "lines"),
    "masked": Kind("masked", "places"),
    "skipped": Kind("skipped", "steps"),
}
"""In the order of showing. `left_out`: files (evaluation: documents) that were never read; `passed_over`: files in
archives, which are known only when these are read."""


def by_reason(kind: str, counts: Mapping[str, int]) -> Metrics:
    """Make the metrics ``kind/reason`` of counts by reason, whatever characters a reason has, at most `MOST_NAMES`."""
    assert kind in KINDS, kind
    named: Counter[str] = Counter()
    for reason, count in counts.items():
        named[plain_name(reason)] += count
    ranked = sorted(named.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(ranked if len(ranked) <= MOST_NAMES else ranked[: MOST_NAMES - 1])
    if rest := sum(named.values()) - sum(kept.values()):
        kept[OTHERS] = kept.get(OTHERS, 0) + rest
    return {f"{kind}/{reason}": float(count) for reason, count in sorted(kept.items())}


def plain_name(reason: str) -> str:
    """Make a reason one that can be a part of a metric's name in MLflow and in paths, which ``.`` and ``..`` can't."""
    name = re.sub(r"[^\w. -]", "_", reason[:80]).strip()
    return name if name.strip(".") else f"_{name}"


def is_discard(name: str) -> bool:
    """Return whether a metric counts what was discarded."""
    kind, slash, _ = name.partition("/")
    return bool(slash) and kind in KINDS


def reasons_of(metrics: Mapping[str, float], kind: str) -> dict[str, float]:
    """Read counts by reason back, the greatest first; those of nothing are left away."""
    found = {
        name.removeprefix(f"{kind}/"): value
        for name, value in metrics.items()
        if value and name.startswith(f"{kind}/")
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def describe(metrics: Mapping[str, float], most: int | None = MOST_REASONS) -> list[str]:
    """Name all that was discarded, by kind: ``98 rejected (90 empty, 8 not_utf8)``.

    Args:
        most: reasons that are named of each kind; None: all.
    """
    return [
        f"{sum(reasons.values()):,.0f} {about.words} ({named(reasons, most)})"
        for kind, about in KINDS.items()
        if (reasons := reasons_of(metrics, kind))
    ]


def named(reasons: Mapping[str, float], most: int | None) -> str:
    """Join reasons, each with its count where there are several."""
    if len(reasons) == 1:
        return next(iter(reasons))
    shown = list(reasons.items())
    if most is not None and len(shown) > most + 1:  # one more takes no more room than its count
        shown = shown[:most]
    named = [f"{count:,.0f} {reason}" for reason, count in shown]
    if rest := len(reasons) - len(shown):
        more = sum(reasons.values()) - sum(count for _, count in shown)
        named.append(f"{more:,.0f} for {rest} other reasons")
    return ", ".join(named)


def warnings(metrics: Mapping[str, float], shares: Mapping[str, float]) -> list[str]:
    """Return what was discarded beyond the allowed fraction; ``shares`` has that of each kind."""
    lines = []
    for kind, allowed in shares.items():
        about, reasons = KINDS[kind], reasons_of(metrics, kind)
        if not reasons or not all(name in metrics for name in about.whole):
            continue
        count = sum(reasons.values())
        whole = sum(metrics[name] for name in about.whole) + (0 if about.included else count)
        if count > allowed * whole:
            found = named(reasons, MOST_REASONS)
            lines.append(f"{count:,.0f} of {whole:,.0f} {about.of} are {about.words} ({found})")
    return lines
