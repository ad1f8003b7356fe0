"""The steps of a recipe and how they are wired: each input comes from a step before it that makes its type.

The keys of a recipe are its steps, in order. A key that is a stage's name is that stage; any other says
``stage: NAME``. The default stages are there without being written, in the order of the table. An input comes from the
step that ``inputs: {TYPE: STEP}`` names, else from the nearest before it whose product agrees with the inputs that are
known: tokens were made by the model's tokenizer, scores are the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.stage import StageConfig
from flows.stage import TYPES, Stage
from flows.stages import BY_NAME, STAGES

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
AGREEING = ("tokenizer", "model")
"""Types of which all inputs of a step must come from one and the same step."""
POSITION = {stage.name: position for position, stage in enumerate(STAGES)}


@dataclass(frozen=True)
class RecipeStep:
    """A step of a recipe."""

    name: str
    stage: Stage
    config: StageConfig
    sources: dict[str, str] = field(default_factory=dict)
    """Type of an input -> the step that makes it."""

    @property
    def makes(self) -> tuple[str, ...]:
        return made_by(self.stage, self.config)


@dataclass(frozen=True)
class Written:
    """The words of a recipe on a step beside its config."""

    stage: Stage
    inputs: Mapping[str, str]


def made_by(stage: Stage, config: StageConfig) -> tuple[str, ...]:
    """The types that a step makes."""
    return config.makes() or (stage.makes,)


def arrange(written: Mapping[str, Stage]) -> list[str]:
    """Order the steps that a recipe writes, and put the default ones that it does not write between them.

    Default stages stand in the order of the table, wherever they are written; the others stay where they are written.
    One that is not written comes right behind the default one before it, and behind those there that take nothing.
    """
    names = list(written)
    defaults = [name for name in names if written[name].default and written[name].name == name]
    ordered = iter(sorted(defaults, key=POSITION.__getitem__))
    names = [next(ordered) if name in defaults else name for name in names]
    stages = dict(written)
    first = 0  # the place behind the default step before
    for stage in STAGES:
        if stage.default and stage.name not in stages:
            while first < len(names) and not stages[names[first]].takes:
                first += 1
            names.insert(first, stage.name)
            stages[stage.name] = stage
        if stage.default:
            first = names.index(stage.name) + 1
    return names


class Wiring:
    """Finds the step that each input comes from.

    Args:
        steps: name -> stage and config, in order, those included that may turn out not to be needed.
        named: what ``inputs`` say of each step.
        wanted: the steps that are there in any case; inputs that may be missing come from these only.
    """

    def __init__(
        self,
        steps: Mapping[str, tuple[Stage, StageConfig]],
        named: Mapping[str, Mapping[str, str]],
        wanted: Collection[str],
    ) -> None:
        self._steps, self._named, self._wanted = steps, named, wanted
        self._order = list(steps)
        self._made = {name: made_by(*step) for name, step in steps.items()}
        self.sources: dict[str, dict[str, str]] = {}
        """Sources of each step that was asked for or is needed by one: type -> step."""
        self._provided: dict[str, dict[str, str]] = {}

    def wire(self, name: str) -> dict[str, str]:
        """Find a step's sources, and theirs.

        Returns:
            Type -> the step that made it, of all that the step's product descends from, itself included.

        Raises:
            UserError: an input can't be had, or two do not agree.
        """
        if name in self._provided:
            return self._provided[name]
        stage, _ = self._steps[name]
        named = self._named.get(name, {})
        self._check_named(name, stage, named)
        sources: dict[str, str] = {}
        provided: dict[str, str] = {}
        for takes in stage.takes:
            wanted = takes.rstrip("?")
            if wanted in stage.only_named and wanted not in named:
                continue
            among = self._order if takes == wanted else self._wanted
            source = self._source(name, wanted, named.get(wanted), provided, among)
            if source is None:
                if takes == wanted:
                    raise UserError(f"{name} takes {wanted}, and {self._why_not(name, wanted, provided)}")
                continue
            sources[wanted] = source
            provided = {**self.wire(source), **provided}
        self.sources[name] = sources
        self._provided[name] = {**provided, **dict.fromkeys(self._made[name], name)}
        return self._provided[name]

    def _check_named(self, name: str, stage: Stage, named: Mapping[str, str]) -> None:
        takes = [one.rstrip("?") for one in stage.takes]
        for wanted, source in named.items():
            if wanted not in takes:
                has = f"it takes {', '.join(takes)}" if takes else "it takes nothing"
                raise UserError(f"{name}.inputs.{wanted}: {stage.name} has no such input; {has}")
            if source not in self._steps:
                raise UserError(
                    f"{name}.inputs.{wanted}: no step is called {source}; there are {', '.join(self._order)}"
                )
            if self._order.index(source) >= self._order.index(name):
                raise UserError(f"{name}.inputs.{wanted}: {source} must stand before {name}")
            if wanted not in self._made[source]:
                raise UserError(
                    f"{name}.inputs.{wanted}: {source} makes {' and '.join(self._made[source])}, not {wanted}"
                )

    def _source(
        self, name: str, wanted: str, chosen: str | None, known: Mapping[str, str], among: Collection[str]
    ) -> str | None:
        """The step that an input comes from; None where there is none ``among`` those that it may come from."""
        if chosen:
            if clash := self._clash(chosen, wanted, known):
                raise UserError(f"{name}.inputs.{wanted}: {chosen} {clash}")
            return chosen
        makers = (one for one in self._makers(name, wanted) if one in among)
        return next((one for one in makers if not self._clash(one, wanted, known)), None)

    def _makers(self, name: str, wanted: str) -> Iterator[str]:
        """The steps before one that make a type, the nearest first."""
        before = self._order[: self._order.index(name)]
        yield from (one for one in reversed(before) if wanted in self._made[one])

    def _clash(self, source: str, wanted: str, known: Mapping[str, str]) -> str:
        """Say in what a step disagrees with the inputs that are known; nothing where it does not.

        Whatever else than the type that is wanted the step makes itself does not count: of an adopted model only the
        tokenizer may be taken, beside a model that was trained further.
        """
        provided = self.wire(source)
        for type_ in AGREEING:
            if type_ != wanted and type_ in self._made[source]:
                continue
            if type_ in known and provided.get(type_, known[type_]) != known[type_]:
                return f"has the {type_} of {provided[type_]}, and other inputs have that of {known[type_]}"
        return ""

    def _why_not(self, name: str, wanted: str, known: Mapping[str, str]) -> str:
        for maker in self._makers(name, wanted):
            clash = self._clash(maker, wanted, known)
            return f"{maker}, which makes some, {clash}: name another with inputs, or add a step"
        later = next((one for one in self._order if wanted in self._made[one] and one != name), None)
        if later:
            return f"{later}, which makes some, stands behind it: move it up"
        return "no step makes any"


def wired(
    steps: Mapping[str, tuple[Stage, StageConfig]],
    named: Mapping[str, Mapping[str, str]],
    wanted: Sequence[str],
) -> tuple[RecipeStep, ...]:
    """Wire the steps that are wanted and those that they need, in order; the others are left out.

    Raises:
        UserError: an input can't be had, or two do not agree.
    """
    wiring = Wiring(steps, named, wanted)
    for name in wanted:
        wiring.wire(name)
    needed = set(wanted)
    waiting = list(wanted)
    while waiting:
        more = set(wiring.sources[waiting.pop()].values()) - needed
        needed |= more
        waiting += more
    return tuple(
        RecipeStep(name=name, stage=stage, config=config, sources=wiring.sources[name])
        for name, (stage, config) in steps.items()
        if name in needed
    )


def read_step(name: str, value: Any) -> Written | None:
    """Read what a recipe's key says of its stage and inputs; None where it names no stage.

    Raises:
        UserError: ``stage`` or ``inputs`` are not what they should be.
    """
    written = value if isinstance(value, Mapping) else {}
    stage = written.get("stage", name if name in BY_NAME else None)
    if stage is None:
        return None
    if not isinstance(stage, str) or stage not in BY_NAME:
        raise UserError(f"{name}.stage: there is no stage {stage}; there are {', '.join(BY_NAME)}")
    if name in BY_NAME and stage != name:
        raise UserError(f"{name}.stage: a step called {name} is that stage; give one of {stage} another name")
    if name in TYPES:
        raise UserError(f"{name}: it is the name of a type; give the step another one")
    if not NAME.fullmatch(name):
        raise UserError(f"{name}: a step's name has letters, digits, _ and - only, and begins with a letter")
    inputs = written.get("inputs") or {}
    if not isinstance(inputs, Mapping) or not all(
        isinstance(one, str) for one in [*inputs, *inputs.values()]
    ):
        raise UserError(f"{name}.inputs: write it as {{TYPE: STEP}}, with the types {', '.join(TYPES)}")
    return Written(BY_NAME[stage], dict(inputs))
