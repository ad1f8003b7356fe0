"""Forecasts of trainings by a ladder: sealed before these run, and scored when they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scipy.stats import binomtest

from data_pipeline.core.errors import UserError
from flows.engine.plan import Step, make_plan
from flows.engine.store import Store
from flows.recipe import load_recipe, shown
from flows.scaling.record import Forecast, Record, read_forecasts, write_forecast
from flows.scaling.rungs import Work, require_from_nothing, vocab_size_of


def foresee(path: Path, changes: Sequence[str], record: Record, home: Path) -> Forecast:
    """Foresee the loss of a recipe, and seal it.

    Raises:
        UserError: the recipe has run; it is not measured on the ladder's text; it can't be planned.
    """
    store = Store(home)
    recipe = load_recipe(path, changes)
    require_from_nothing(recipe)
    steps = make_plan(recipe, store)
    by_name = {step.name: step for step in steps}
    vocab_size = vocab_size_of(steps)
    if "evaluate" not in by_name or by_name["evaluate"].sources["model"] != "pretrain":
        raise UserError(
            "a forecast is of the loss that evaluate measures of pretrain's model: the recipe has no such step"
        )
    evaluated, trained = by_name["evaluate"], by_name["pretrain"]
    for step in (trained, evaluated):
        if step.fingerprint is None or step.config is None:
            raise UserError(f"{step.name}: {'; '.join(step.why)}")
        if step.action != "run":
            made = "is made already" if step.action == "reuse" else "has begun"
            raise UserError(f"{step.name} of this recipe {made}: there is nothing to foresee")
    require_text(evaluated, record)
    work = Work.of(trained.config, vocab_size)  # type: ignore[arg-type]
    interval = record.ladder.forecast(parameters=work.parameters, tokens=work.tokens, flops=work.flops)
    before = read_forecasts(home)
    forecast = Forecast(
        number=len(before) + 1,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        ladder=record.name,
        recipe=recipe.name,
        settings=[shown(one) for one in changes],
        parameters=work.parameters,
        tokens=work.tokens,
        flops=work.flops,
        beyond=work.flops / record.ladder.budgets[-1],
        middle=interval.middle,
        low=interval.low,
        high=interval.high,
        evaluation=str(evaluated.fingerprint),
        before=before[-1].sha256 if before else "",
    )
    write_forecast(home, forecast)
    return forecast


def require_text(evaluated: Step, record: Record) -> None:
    """Refuse an evaluation of another text than the ladder's.

    Raises:
        UserError: it is one.
    """
    text = {
        "tokens": evaluated.inputs.get("tokens"),
        "tokenizer": evaluated.inputs.get("tokenizer"),
        "max_documents": str(getattr(evaluated.config, "max_documents", None)),
    }
    if others := [name for name, value in record.text.items() if text[name] != value]:
        raise UserError(
            f"this recipe is measured on another text than ladder {record.name} ({', '.join(others)}): what "
            "holds of one need not hold of the other"
        )


@dataclass(frozen=True)
class Scored:
    """A forecast, and what came of it."""

    forecast: Forecast
    measured: float | None
    """None where it has not run."""

    @property
    def outcome(self) -> str:
        """Say how it came out."""
        if self.measured is None:
            return "has not run"
        return "inside" if self.measured in self.forecast.interval else "outside"


def scored(home: Path) -> list[Scored]:
    """Score all forecasts of a home."""
    store = Store(home)
    return [Scored(one, one.measured(store)) for one in read_forecasts(home)]


def calibration(found: Sequence[Scored]) -> str:
    """Say how many came out inside their interval."""
    run = [one for one in found if one.measured is not None]
    if not run:
        return "none of them has run yet"
    inside = sum(one.outcome == "inside" for one in run)
    low, high = binomtest(inside, len(run)).proportion_ci(method="wilson")
    return (
        f"{inside} of {len(run)} lie inside their bounds ({inside / len(run):.0%}; 95% interval {low:.0%} to "
        f"{high:.0%}), and nine of ten should"
    )
