"""The comparison at the end of a run: each model that it evaluated, beside the one that its recipe made before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flows.engine.events import Compared
from flows.engine.order import Order, Result
from flows.engine.store import Artifact, Store
from flows.listeners.last_score import evaluation_before
from flows.stages import BY_NAME

PAGE = "compare.html"
BEFORE, THIS = "the run before", "this run"
"""Labels of the two, of which the verdict speaks."""


def with_predecessors(order: Order, key: str, results: Mapping[str, Result]) -> Iterator[Compared]:
    """Compare what a run has just evaluated; nothing of what it reused, which the run that made it has compared.

    Args:
        key: the key by which the run is known.

    Raises:
        UserError: something that one of the models was made from is not in the store.
    """
    store = order.planned.uses.store
    for step, result in results.items():
        artifact = result.artifact
        if artifact.stage != "evaluate" or result.how == "reused":
            continue
        before = evaluation_before(store, order.recipe.name, step, artifact.fingerprint)
        if before:
            yield compared(store, (before, artifact), order=order, key=key, step=step)


def compared(
    store: Store, evaluations: tuple[Artifact, Artifact], *, order: Order, key: str, step: str
) -> Compared:
    """Put this run's model and the one before side by side."""
    # numpy and pyarrow, which a run that evaluates nothing does without
    from flows.compare.compare import compare
    from flows.compare.page import page
    from flows.compare.subjects import Subject, sealed_line

    before, this = evaluations
    names = str(before.manifest.get("run") or f"evaluate {before.fingerprint[:8]}"), order.name
    comparison = compare(
        [
            Subject(BEFORE, names[0], sealed_line(store, before)),
            Subject(THIS, names[1], sealed_line(store, this)),
        ]
    )
    return Compared(
        run=key,
        step=step,
        before=names[0],
        verdict=comparison.verdict.about_models,
        page=PAGE if step in BY_NAME else f"{step}/{PAGE}",
        html=page(comparison.for_mlflow),
    )
