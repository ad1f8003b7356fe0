"""The runs of a ladder: for each budget of FLOPs models of some sizes, with seeds of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError
from flows.compare.members import SEED, Member, first_seed
from flows.engine.plan import Step, make_plan
from flows.engine.store import Store
from flows.recipe import Recipe, load_recipe
from flows.scaling.tables import flops
from llm.model.config import ModelConfig
from llm.pretrain.config import PretrainConfig, vocabulary
from llm.scaling.law import LEAST_BUDGETS
from llm.scaling.shapes import matrices, shapes

LEAST_STEPS = 10
"""Fewest steps of a training of a ladder."""


@dataclass(frozen=True)
class RungMember:
    """A run of a ladder that is to be made."""

    member: Member
    budget: float
    """FLOPs."""
    work: Work


@dataclass(frozen=True, kw_only=True)
class Work:
    """The size of a training."""

    parameters: int
    """Numbers in matrices."""
    tokens: int
    flops: float

    @classmethod
    def of(cls, config: PretrainConfig, vocab_size: int) -> Work:
        """Work it out for a training of a model with so many tokens in its vocabulary."""
        model = ModelConfig(**config.model.model_dump(), vocab_size=vocab_size)
        tokens = config.tokens_after(config.steps)
        return cls(parameters=matrices(model), tokens=tokens, flops=model.flops_per_token() * tokens)


def read_budgets(text: str) -> list[float]:
    """Read ``1e14,3e14,1e15``.

    Raises:
        UserError: these are no three rising numbers.
    """
    try:
        budgets = [float(one) for one in text.split(",")]
    except ValueError:
        raise UserError(f"--flops {text}: write it as 1e14,3e14,1e15") from None
    if len(budgets) < LEAST_BUDGETS or sorted(set(budgets)) != budgets or budgets[0] <= 0:
        raise UserError(
            f"--flops {text}: give {LEAST_BUDGETS} rising budgets at least: the largest shows how far off the law of "
            "the others is"
        )
    return budgets


def require_from_nothing(recipe: Recipe) -> None:
    """Refuse a training that begins with a model: its own tokens are not all that it has read.

    Raises:
        UserError: it does; or there is none.
    """
    step = next((one for one in recipe.steps if one.name == "pretrain"), None)
    if step is None or not isinstance(step.config, PretrainConfig):
        raise UserError("a law of loss is one of pretraining: the recipe has no step pretrain")
    if "model" in step.sources or step.config.init_from is not None:
        raise UserError(
            "pretrain begins with a model: a law of tokens holds of trainings that begin from nothing"
        )


def merged(rungs: Sequence[RungMember], sizes: int) -> list[str]:
    """Say which budgets have fewer sizes than were asked for."""
    lines = []
    for budget in dict.fromkeys(one.budget for one in rungs):
        found = {one.work.parameters for one in rungs if one.budget == budget}
        if len(found) < sizes:
            lines.append(
                f"{flops(budget)} FLOPs: {len(found)} sizes in place of {sizes}, for others would be these again"
            )
    return lines


def vocab_size_of(steps: Sequence[Step]) -> int:
    """Return the size of the vocabulary that a recipe's training has.

    Raises:
        UserError: it is not known before it is made.
    """
    by_name = {step.name: step for step in steps}
    source = by_name[by_name["pretrain"].sources["tokenizer"]]
    known = vocabulary(source.config, source.artifact.path if source.artifact else None)
    if known is None:
        raise UserError(f"the size of the vocabulary that {source.name} makes is not known yet: run it first")
    return known[0]


def read_rungs(
    path: Path, changes: Sequence[str], *, budgets: Sequence[float], sizes: int, seeds: int, store: Store
) -> list[RungMember]:
    """List the runs, from the smallest budget on.

    Raises:
        UserError: the recipe can't be planned; a budget is too small.
    """
    recipe = load_recipe(path, changes)
    require_from_nothing(recipe)
    if recipe.pretrain.decay_at is not None:  # type: ignore[attr-defined]
        raise UserError(
            "pretrain.decay_at says how long training lasts, and here that is varied: set tokens in its place"
        )
    first, vocab_size = first_seed(recipe), vocab_size_of(make_plan(recipe, store))
    model = ModelConfig(**recipe.pretrain.model.model_dump(), vocab_size=vocab_size)  # type: ignore[attr-defined]
    found = []
    for budget in budgets:
        for shape in shapes(model, budget, sizes):
            tokens = budget / shape.flops_per_token
            # The batch may follow from the tokens (`depth`), which are a whole number of batches.
            asked = load_recipe(path, [*changes, *shape.settings, f"pretrain.tokens={max(1, round(tokens))}"])
            batch: int = asked.pretrain.batch_tokens  # type: ignore[attr-defined]
            steps = round(tokens / batch)
            if steps < LEAST_STEPS:
                raise UserError(
                    f"--flops {flops(budget)} trains {shape.parameters:,} parameters on {tokens:,.0f} tokens, which "
                    f"are not {LEAST_STEPS} batches of {batch:,}:\nraise it, or lower pretrain.batch_tokens"
                )
            fixed = (*shape.settings, f"pretrain.batch_tokens={batch}", f"pretrain.tokens={steps * batch}")
            for seed in range(first, first + seeds):
                size = (f"pretrain.model.layers={shape.layers}", f"pretrain.model.width={shape.width}")
                chosen = (*size, f"pretrain.tokens={steps * batch}", f"{SEED}={seed}")
                settings = (*changes, *fixed, f"{SEED}={seed}")
                planned = load_recipe(path, settings)
                member = Member(
                    chosen=chosen, settings=settings, recipe=planned, steps=make_plan(planned, store)
                )
                work = Work.of(planned.pretrain, vocab_size)  # type: ignore[attr-defined]
                found.append(RungMember(member, budget, work))
    return found
