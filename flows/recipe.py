"""A recipe: one YAML file that describes a run. It only composes the configs of its steps (`flows.steps`).

Precedence: defaults < YAML < ``--set step.field=value``. Mistakes are reported with file, line and key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, create_model, model_validator

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.processes import cores
from data_pipeline.download.redaction import without_secrets
from data_pipeline.download.sources import KINDS
from data_pipeline.stage import Runtime, StageConfig
from flows.stage import Stage
from flows.stages import STAGES
from flows.steps import RecipeStep, Written, arrange, made_by, read_step, wired

DECIMAL = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE
    ),
}


class Loader(yaml.SafeLoader):
    """Reads YAML in which 0100 is no octal number and 1:30 no sexagesimal one: they stay text, for a config to read."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, DECIMAL.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

SECRET = re.compile(r"(^|[._-])(key|secret|token|password|credentials?|signature)$", re.IGNORECASE)
"""Names of settings that no recipe has, but which a person may try to give a secret by."""


class RecipeRuntime(Runtime):
    """How the whole run is executed; changes no artifact."""

    task_runner: Literal["threads", "processes", "dask", "ray"] = "processes"
    """Where work over shards runs; always as Prefect tasks, and always to the same bytes."""

    address: str | None = Field(default=None, min_length=1)
    """Address of a Dask scheduler or Ray cluster to use; without it, one of local processes is started for the run."""

    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Items worked on at once; ``auto`` is the number of cores. A cluster at an address has its own number."""

    parallel_steps: int = Field(default=1, ge=1)
    """Steps at work at once, where none needs another's product; each in a process of its own, with its share of
    ``workers``. Those that train take turns where there are GPUs."""

    upload_mb: float = Field(default=10, ge=0)
    """Payloads up to this size are uploaded to MLflow; larger ones are logged by reference."""

    warn_rejected: float = Field(default=0.1, ge=0, le=1)
    """Warn where more than this share of a source's records is rejected, or of its files left out."""

    warn_dropped: float = Field(default=0.9, ge=0, le=1)
    """Warn where rules drop, or dedup removes, more than this share of the documents."""

    upload_texts: bool = True
    """Whether documents and examples of them are uploaded; else what holds some is logged by place and checksums."""

    price_per_hour: float | None = Field(default=None, gt=0)
    """Price of an hour of the machines that train, in any currency: forecasts say what a training will cost."""

    notify: tuple[str, ...] = ()
    """Receivers of a notice of the run's end: ``env:VARIABLE`` that holds a webhook's address, or ``TYPE/NAME`` of a
    block of Prefect's, such as ``slack-webhook/team``."""

    @property
    def discard_shares(self) -> dict[str, float]:
        """Shares of what is discarded, by kind, above which a run warns."""
        rejected, dropped = self.warn_rejected, self.warn_dropped
        return {"left_out": rejected, "rejected": rejected, "dropped": dropped, "removed": dropped}

    @property
    def elsewhere(self) -> bool:
        """Whether work over shards may run on other machines, in other folders than the current one."""
        return self.task_runner in ("dask", "ray")

    @property
    def worker_count(self) -> int:
        """Number of workers on this machine."""
        return cores() if self.workers == "auto" else self.workers

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> Self:
        if self.address and not self.elsewhere:
            raise ValueError("an address needs task_runner: dask or ray")
        return self


class Recipe(Config):
    """A recipe: what to build and how to run it; besides these fields, one for each step, with its config."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The MLflow experiment and the Prefect flow are called so."""

    description: str = ""
    """Purpose of the run; shown in MLflow and Prefect."""
    runtime: RecipeRuntime = RecipeRuntime()

    _steps: tuple[RecipeStep, ...] = PrivateAttr(())

    @property
    def steps(self) -> tuple[RecipeStep, ...]:
        """In order, each behind those that it needs."""
        return self._steps

    def step(self, name: str) -> RecipeStep:
        return next(step for step in self._steps if step.name == name)


HEAD = tuple(Recipe.model_fields)


def recipe_model(stages: Mapping[str, Stage]) -> type[Recipe]:
    """The model of recipes that have these steps (name -> stage)."""
    return _recipe_model(tuple(stages.items()))


@cache
def _recipe_model(stages: tuple[tuple[str, Stage], ...]) -> type[Recipe]:
    fields: dict[str, Any] = {name: of_stage(stage.config) for name, stage in stages}
    return create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, **fields)


def of_stage(config: type[StageConfig]) -> tuple[type[StageConfig], Any]:
    """A step's key in a recipe: it may be left out where its config has defaults for all."""
    needs = any(field.is_required() for field in config.model_fields.values())
    return config, ... if needs else config()


def every_stage() -> type[Recipe]:
    """The model of a recipe that has each stage once, under its own name."""
    return recipe_model({stage.name: stage for stage in STAGES})


def default_config(stage: Stage) -> StageConfig:
    """The config of a step that is not written; without what it lacks, where that must be given."""
    lacking = of_stage(stage.config)[1] is ...
    return stage.config.model_construct() if lacking else stage.config()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``step.field=value`` overrides.

    A relative path inside the recipe means relative to the current folder, as on any command line.

    Raises:
        UserError: no such file, bad YAML, an unknown key, a value of the wrong type or out of range, steps that can't
            be wired.
    """
    if not path.is_file():
        raise UserError(f"no recipe at {path}; those that come with llmill: {', '.join(shipped_recipes())}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader)
        refuse_repeated_keys(node, path)
        values = yaml.load(text, Loader) or {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # YAML's dates and numbers may be impossible ones
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of step names to settings")
    for override in overrides:
        apply_override(values, override)
    try:
        return build_recipe(values)
    except Mistaken as mistaken:
        raise UserError(describe_mistakes(mistaken, path, node, overrides, values)) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def first_mistake(error: ValidationError, name: str) -> UserError:
    """Describe the first thing that a config refuses which no file describes; ``name`` stands where no key does."""
    mistake = error.errors()[0]
    key = ".".join(map(str, mistake["loc"])) or name
    return UserError(f"{key}: {mistake['msg'].removeprefix('Value error, ')}")


class Mistaken(Exception):
    """A recipe that its model refuses."""

    def __init__(self, error: ValidationError, model: type[Recipe], stages: Mapping[str, Stage]) -> None:
        super().__init__(str(error))
        self.error, self.model, self.stages = error, model, stages


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of what a file says.

    Raises:
        Mistaken: a key or a value is wrong.
        UserError: steps are wrong, or can't be wired.
    """
    written = {
        name: step
        for name in values
        if isinstance(name, str) and name not in HEAD and (step := read_step(name, values[name]))
    }
    stages = {name: step.stage for name, step in written.items()}
    if taken := [name for name in stages if hasattr(Recipe, name)]:
        raise UserError(f"{taken[0]}: no step can be called so; give it another name")
    begins = any(not stage.default and not stage.takes for stage in stages.values())
    if not begins:  # else only those that are needed: what they make may come from elsewhere
        stages |= {stage.name: stage for stage in STAGES if stage.default and stage.name not in stages}
    model = recipe_model({name: stages[name] for name in arrange(stages) if name in stages})
    try:
        recipe = model.model_validate(
            {name: config_of(value) if name in written else value for name, value in values.items()}
        )
    except ValidationError as error:
        raise Mistaken(error, model, stages) from None
    recipe._steps = wire(recipe, written, begins)
    return recipe


def step_names(path: Path) -> dict[str, str]:
    """Name -> stage of each step that a recipe may have, as far as it can be read; nothing else of it is checked."""
    stages: dict[str, Stage] = {}
    with suppress(OSError, ValueError, yaml.YAMLError, UserError):
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in HEAD and (step := read_step(str(name), value)):
                stages[str(name)] = step.stage
    return {name: stages[name].name if name in stages else name for name in arrange(stages)}


def config_of(value: Any) -> Any:
    """Return what a step's key holds, without its place among the others."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return value
    return {key: one for key, one in value.items() if key not in ("stage", "inputs")}


def wire(recipe: Recipe, written: Mapping[str, Written], begins: bool) -> tuple[RecipeStep, ...]:
    """The steps of a recipe, with what each reads.

    Where a written step ``begins`` with what was made elsewhere, the default stage that makes such a thing first is
    not there, nor is any that no written step needs.
    """
    configs = {name: getattr(recipe, name) for name in written}
    elsewhere = {
        type_
        for name, step in written.items()
        if not step.stage.takes and not step.stage.default
        for type_ in made_by(step.stage, configs[name])
    }
    first = {stage.makes: stage.name for stage in reversed(STAGES) if stage.default}
    passed_over = {first[type_] for type_ in elsewhere if type_ in first} - written.keys()
    steps: dict[str, tuple[Stage, StageConfig]] = {}
    by_name = {stage.name: stage for stage in STAGES} | {name: step.stage for name, step in written.items()}
    for name in arrange({name: step.stage for name, step in written.items()}):
        if name in passed_over:
            continue
        stage = by_name[name]
        steps[name] = stage, getattr(recipe, name) if hasattr(recipe, name) else default_config(stage)
    named = {name: step.inputs for name, step in written.items()}
    made = wired(steps, named, list(written) if begins else list(steps))
    for step in made:
        if begins and step.name not in written and of_stage(step.stage.config)[1] is ...:
            raise UserError(f"{step.name} is needed, and must be written: it has settings without a default")
        try:
            step.config.check_wired(step.sources)
        except UserError as error:
            raise UserError(f"{step.name}: {error}") from None
    return made


def refuse_repeated_keys(node: Any, path: Path) -> None:
    """YAML lets a later key silently replace an earlier one; a person who writes ``clean:`` twice means both."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UserError(f"{path}:{key.start_mark.line + 1}: {key.value} is there twice")
            seen.add(key.value)
            refuse_repeated_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            refuse_repeated_keys(item, path)


def shipped_recipes() -> list[str]:
    """The recipes in this package, as paths that ``llmill run`` takes from a clone."""
    return sorted(f"flows/recipes/{path.name}" for path in (Path(__file__).parent / "recipes").glob("*.yaml"))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key, in place. The value is read as YAML; list items are named by their position.

    ``pretrain.lr=3e-3``, ``clean.gopher.min_words=null``, ``download.sources.0.path=books/``.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {shown(override)}: write it as step.field=value")
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        problem = without_secrets(" ".join(str(error).split()))
        raise UserError(f"--set {shown(override)}: {problem}") from None
    *parents, last = key.split(".")
    target: Any = values
    for part in parents:
        target = (
            target[list_position(target, part, override)] if isinstance(target, list) else child(target, part)
        )
        if not isinstance(target, dict | list):
            raise UserError(f"--set {shown(override)}: {part} holds a value, not settings")
    if isinstance(target, list):
        target[list_position(target, last, override)] = value
    else:
        target[last] = value


def shown(setting: str) -> str:
    """A setting as it may be kept and shown: without passwords and queries of addresses, which may be signatures, and
    without the value of what is named like a secret."""
    key, equals, _ = setting.partition("=")
    if equals and SECRET.search(key):
        return f"{key}=***"
    return without_secrets(setting)


def child(mapping: dict[str, Any], key: str) -> Any:
    """``mapping[key]``, made an empty mapping where it is missing or empty."""
    if mapping.get(key) is None:
        mapping[key] = {}
    return mapping[key]


def list_position(values: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(values):
        raise UserError(
            f"--set {shown(override)}: {part} is not a position in a list of {len(values)} (they start at 0)"
        )
    return int(part)


def describe_mistakes(
    mistaken: Mistaken, path: Path, node: Any, overrides: Sequence[str], values: Any
) -> str:
    """One line a mistake: where (file and line, or --set), which key, and what is wrong with it."""
    mistakes = [(as_written(mistake["loc"], values), mistake) for mistake in mistaken.error.errors()]
    lines: dict[str, str] = {}
    for location, mistake in mistakes:
        if any(len(other) > len(location) and other[: len(location)] == location for other, _ in mistakes):
            continue  # a list that lacks its only item because that item is wrong
        key = ".".join(str(part) for part in location)
        within = mistake["type"] == "extra_forbidden"
        named = [text for text in overrides if is_of(text.partition("=")[0], key, within)]
        where = f"--set {shown(named[-1])}" if named else f"{path}:{line_of(node, location)}"
        message = mistake["msg"].removeprefix("Value error, ")
        given = mistake.get("input")
        if mistake["type"] == "extra_forbidden":
            message = "no such key" + (moved(key, mistaken.stages) or suggestion(location, mistaken.model))
        elif mistake["type"] not in ("missing", "value_error") and isinstance(
            given, str | int | float | bool | None
        ):
            message += f" (got {given!r})"
        place, message = f"{where}: {key}", without_secrets(message)
        lines[place] = f"{lines[place]}, or {message}" if place in lines else f"{place}: {message}"
    return "\n".join(lines.values())


def as_written(location: Sequence[str | int], values: Any) -> tuple[str | int, ...]:
    """A mistake's place as a person wrote it: without the names that pydantic gives to the parts of a union.

    A key that ``values`` has there is a person's, whatever it looks like.
    """
    kept: list[str | int] = []
    for part in location:
        theirs = isinstance(values, Mapping) and part in values
        of_union = isinstance(part, str) and re.search(r"[\[(]|^int$|^str$|^constrained-int$", part)
        if theirs or not (of_union or (kept and isinstance(kept[-1], int) and is_kind(part))):
            kept.append(part)
        if theirs or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            values = values[part]
    return tuple(kept)


def is_kind(part: str | int) -> bool:
    """Whether this is the tag of a kind of source, which pydantic names after its position in the list."""
    return part in KINDS


def is_of(setting: str, key: str, within: bool) -> bool:
    """Whether an override's ``setting`` is a ``key`` that was refused, holds it, or, where ``within``, lies in it."""
    return f"{key}.".startswith(f"{setting}.") or (within and setting.startswith(f"{key}."))


def moved(key: str, stages: Mapping[str, Stage]) -> str:
    """``; it is pretrain.runtime.validation now``; nothing where a key never existed."""
    step, _, name = key.partition(".")
    places = stages[step].config.moved if step in stages else {}
    return f"; it is {step}.{places[name]} now" if name in places else ""


def suggestion(location: Sequence[str | int], model: type[BaseModel]) -> str:
    """``; did you mean min_words?``, or the keys that there are."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        within = model_in(field.annotation) if field else None
        if within is None:
            return ""
        model = within
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    known = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(model.model_fields)}"
    return known if len(location) > 1 else f"{known}, and a step of another name names its `stage`"


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The config that a field holds, always or unless it is None."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def line_of(node: Any, location: Sequence[str | int]) -> int:
    """The line (from 1) of the deepest part of ``location`` that the YAML document spells out."""
    line = 1
    for part in location:
        following = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, following = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            following = node.value[part]
            line = following.start_mark.line + 1
        if following is None:
            break
        node = following
    return line


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists are numbered like mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(position): item for position, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
