"""A ladder: a sweep over sizes and budgets whose end is a law of loss, not a ranking."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.core.errors import UserError
from flows.compare.members import Ended
from flows.compare.sweep import Sweep
from flows.engine.store import Artifact, Store, canonical_json
from flows.headline import BITS
from flows.listeners.terminal import Terminal
from flows.scaling.page import page
from flows.scaling.record import Record, write_ladder
from flows.scaling.rungs import RungMember
from flows.scaling.tables import flops, in_short, law_text
from llm.scaling.law import Rung

PAGE = "ladder.html"


class LadderRun:
    """The runs of a ladder, under one parent in MLflow."""

    def __init__(self, rungs: Sequence[RungMember], home: Path, terminal: Terminal, command: str) -> None:
        self.rungs, self.home = rungs, home
        self.recipe = rungs[0].member.recipe.name
        budgets = ", ".join(flops(one) for one in dict.fromkeys(one.budget for one in rungs))
        members = [one.member for one in rungs]
        self.sweep = Sweep(members, home, terminal, command, name=f"ladder of {budgets} FLOPs")

    def finish(self, ended: Sequence[Ended]) -> Record | None:
        """Fit the law to the runs that ended well, write it down, and end the parent; None where they are too few.

        Raises:
            UserError: they were not measured on the same text.
        """
        store = Store(self.home)
        of_member = {id(one.member): one for one in self.rungs}
        found = [
            (of_member[id(one.member)], store.get("evaluate", one.evaluation))
            for one in ended
            if not one.failure
        ]
        measured = [(one, made) for one, made in found if made and BITS in made.metrics]
        if len(measured) < len(self.rungs):
            self.sweep.conclude(
                ended, text=f"{len(measured)} of {len(self.rungs)} runs ended well: no law is fitted"
            )
            return None
        texts = {canonical_json(text_of(made)): text_of(made) for _, made in measured}
        if len(texts) > 1:
            raise UserError("the runs were measured on other texts, by their settings: no law is fitted")
        rungs = [
            Rung(
                parameters=one.work.parameters,
                tokens=one.work.tokens,
                flops=one.work.flops,
                loss=made.metrics[BITS],
                budget=one.budget,
            )
            for one, made in measured
        ]
        key = hashlib.sha256(canonical_json([one.member.key for one, _ in measured]).encode()).hexdigest()[:8]
        record = Record(
            name=f"{self.recipe}-{key}",
            recipe=self.recipe,
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            key=self.sweep.key,
            text=next(iter(texts.values())),
            flops_per_second=rate(store, self.rungs),
            rungs=rungs,
        )
        write_ladder(self.home, record)
        note = "\n\n".join([law_text(record.ladder), *in_short(record), f"The whole ladder is in `{PAGE}`."])
        self.sweep.conclude(ended, text=note, evidence={PAGE: page(record)})
        return record


def text_of(evaluation: Artifact) -> dict[str, str]:
    """Describe the text that an evaluation measured."""
    inputs = evaluation.inputs
    return {
        "tokens": inputs["tokens"].fingerprint,
        "tokenizer": inputs["tokenizer"].fingerprint,
        "max_documents": str(evaluation.manifest["config"].get("max_documents")),
    }


def rate(store: Store, rungs: Sequence[RungMember]) -> float:
    """Return the FLOPs a second that the trainings of the largest budget reached, their starts included."""
    largest = [one for one in rungs if one.budget == rungs[-1].budget]
    flops = seconds = 0.0
    for one in largest:
        step = one.member.step("pretrain")
        made = store.get("pretrain", str(step.fingerprint))
        if made:
            flops, seconds = flops + one.work.flops, seconds + made.manifest["seconds"]
    return flops / seconds if seconds else 0.0
