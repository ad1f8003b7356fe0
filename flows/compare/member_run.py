"""One run of a sweep, carried out: like any other, but for what stands above it in MLflow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.documents import count_rows
from flows.compare.members import Member
from flows.engine.log import Listener
from flows.engine.naming import name_run
from flows.engine.order import Order
from flows.engine.plan import Planned, Selection
from flows.engine.store import Artifact
from flows.recipe import Recipe, shown
from llm.score.statistics import MIN_DOCUMENTS


class NoVerdict(UserError):
    """A sweep that could not show anything when all of it was trained."""


def require_documents(artifact: Artifact) -> None:
    """Refuse token shards that hold out too few documents for a comparison.

    Raises:
        NoVerdict: they do.
    """
    if artifact.stage == "tokenize":
        held_out = sum(count_rows(path) for path in artifact.path.glob("val-*.parquet"))
        if held_out < MIN_DOCUMENTS:
            raise NoVerdict(
                f"{held_out} held-out documents are too few to compare models by, {MIN_DOCUMENTS} are needed: nothing "
                "was trained;\nraise tokenize.val_fraction, or cut the text into more documents (split_chars)"
            )


@dataclass(frozen=True, kw_only=True)
class MemberRun:
    """The input of a member's run, besides its recipe."""

    file: Path
    """The recipe's file."""
    chosen: tuple[str, ...]
    settings: tuple[str, ...]
    by_documents: bool
    """Whether held-out documents are what models are compared by."""
    home: Path
    command: str
    parent: str
    """The key of the run that it stands under in MLflow."""

    @classmethod
    def of(cls, member: Member, *, file: Path, home: Path, command: str, parent: str) -> MemberRun:
        return cls(
            file=file,
            chosen=member.chosen,
            settings=member.settings,
            by_documents=not member.scored_on,
            home=home,
            command=command,
            parent=parent,
        )


def carry_out(run: MemberRun, recipe: Recipe, terminal: Listener) -> str:
    """Run a member; return the key by which its run is found in MLflow."""
    from flows.prefect.pipeline import Pipeline  # Prefect reads its settings when it is imported

    planned = Planned.of(recipe, run.home, Selection())
    order = Order(planned=planned, name=name_run(planned, run.chosen), command=run.command, sweep=run.parent)
    if run.by_documents:
        order = replace(order, look=require_documents)
    parameters = {
        "recipe": str(run.file.resolve()),
        "settings": [shown(setting) for setting in run.settings],
        "stages": {},
        "home": str(run.home.resolve()),
    }
    with Pipeline(order, {"the terminal": terminal}) as pipeline:
        pipeline.prepare()
        with pipeline.flow(parameters) as begin:
            begin()
    return pipeline.executor.reporter.known.key
