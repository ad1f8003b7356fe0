"""The reference of settings, from the configs themselves: name, type, default, range, and what each does.

What a setting does is the docstring below its field; it is read from the source where it is asked for.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import table
from flows.recipe import HEAD, every_stage

TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
ITEMS = {"min_length": "{} or more of them", "max_length": "{} of them at most"}
CHARACTERS = {
    "min_length": "from {} character(s)",
    "max_length": "to {} character(s)",
    "pattern": "matching {}",
}


@dataclass(frozen=True)
class Setting:
    """One key of a recipe."""

    name: str
    """Dotted, as ``--set`` takes it; ``N`` stands for a position in a list."""
    type: str
    default: str
    """As YAML has it; empty where the key is required."""
    range: str
    """Values that are taken, beyond the type; empty where any is."""
    description: str
    choices: tuple[str, ...] = ()
    """All values that are taken, where these are few."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def settings(prefix: str = "") -> list[Setting]:
    """List all settings whose name is ``prefix`` or lies in it, in the order of a recipe.

    Raises:
        UserError: there is none.
    """
    known = list(of_model(every_stage(), ""))
    found = [one for one in known if f"{one.name}.".startswith(f"{prefix}.")] if prefix else known
    if not found:
        close = difflib.get_close_matches(prefix, group_names(), 3, 0.5)
        hint = (
            f"did you mean {', '.join(close)}?"
            if close
            else f"there are {', '.join(every_stage().model_fields)}"
        )
        raise UserError(f"no setting is called {prefix}; {hint}")
    return found


def group_names() -> list[str]:
    """List the names of all settings and of the groups that they form, each once."""
    names = (name.split(".") for name in dict.fromkeys(one.name for one in of_model(every_stage(), "")))
    return list(dict.fromkeys(name for parts in names for name in accumulate(parts, "{}.{}".format)))


def of_model(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    """The settings of a config and of those that it holds."""
    for key, field in model.model_fields.items():
        name = f"{prefix}{key}"
        held = list(models_in(field.annotation))
        if field.annotation not in held:
            yield Setting(
                name=name,
                type=type_of(field.annotation),
                default=default_of(field),
                range=range_of(field),
                choices=tuple(choices_of(field.annotation)),
                description=documented(model).get(key) or ("Which kind of source." if key == "kind" else ""),
            )
        item = (
            ".N"
            if is_list(field.annotation)
            else ".NAME"
            if get_origin(bare(field.annotation)) is dict
            else ""
        )
        yield from of_union(held, f"{name}{item}.")


def of_union(models: Sequence[type[BaseModel]], prefix: str) -> Iterator[Setting]:
    """The settings of several configs that stand in one place, each once; which ``kind`` has it, where not all do."""
    kinds: dict[Setting, list[str]] = {}
    for model in models:
        for setting in of_model(model, prefix):
            kind = model.model_fields["kind"].default if "kind" in model.model_fields else ""
            kinds.setdefault(setting, []).append(kind)
    for setting, found in kinds.items():
        only = f"Of {', '.join(found)}. " if len(found) < len(models) else ""
        yield replace(setting, description=f"{only}{setting.description}".strip())


def bare(annotation: Any) -> Any:
    """An annotation without constraints and without None."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [one for one in get_args(annotation) if one is not type(None)]
        return bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def is_list(annotation: Any) -> bool:
    return get_origin(bare(annotation)) in (tuple, list)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configs that values of an annotation consist of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for one in get_args(annotation):
            yield from models_in(one)


def type_of(annotation: Any) -> str:
    """An annotation in words: ``integer or null``, ``list of text``, ``adamw, muon``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_of, args)))
    if origin in (tuple, list):
        return f"list of {type_of(args[0])}"
    if origin is dict:
        return f"mapping of {type_of(args[0])} to {type_of(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "settings"
    return TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def choices_of(annotation: Any) -> Iterator[str]:
    """The values that an annotation names one by one, as YAML has them."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for one in get_args(annotation):
            yield from choices_of(one)


def default_of(field: FieldInfo) -> str:
    """A field's default as YAML has it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, Mapping | tuple | list | bool) or value is None:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, default=str)
    return str(value) if value != "" else '""'


def range_of(field: FieldInfo) -> str:
    """A field's constraints in words."""
    parts: list[str] = []
    lengths = CHARACTERS if bare(field.annotation) is str else ITEMS
    for constraint in [*field.metadata, *constraints_in(field.annotation)]:
        for names in (BOUNDS, lengths):
            parts += [
                words.format(f"{value:,}" if isinstance(value, int) else value)
                for name, words in names.items()
                if (value := getattr(constraint, name, None)) is not None
            ]
    return ", ".join(dict.fromkeys(parts))


def constraints_in(annotation: Any) -> Iterator[Any]:
    """List what stands beside types in `Annotated`, at any depth."""
    if get_origin(annotation) is Annotated:
        for one in get_args(annotation)[1:]:
            yield from one.metadata if isinstance(one, FieldInfo) else [one]
    if get_origin(annotation) is not Literal:
        for one in get_args(annotation):
            yield from constraints_in(one)


@cache
def documented(model: type[BaseModel]) -> dict[str, str]:
    """Return what the docstrings below a config's fields say, those of its bases among them, each in one line."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if not issubclass(one, BaseModel) or one.__module__.startswith("pydantic"):
            continue
        try:
            body = docstrings(inspect.getsourcefile(one) or "").get(one.__name__, {})
        except TypeError:  # made by create_model
            continue
        found |= body
    return found


@cache
def docstrings(file: str) -> dict[str, dict[str, str]]:
    """Class -> field -> docstring, of the classes in a file."""
    with open(file, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            fields: dict[str, str] = {}
            for field, after in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and isinstance(after.value.value, str)
                ):
                    fields[field.target.id] = " ".join(after.value.value.split())
            found[node.name] = fields
    return found


def reference() -> str:
    """``docs/settings.md``."""
    parts = [
        "# Settings",
        "All that a recipe may say, and `--set` changes. Made from the configs by `python -m flows.settings`; "
        "`llmill settings [STAGE[.FIELD]]` prints the same. Each key of a recipe is a step: one that is not the name "
        "of a stage also says `stage: NAME`, and any may say `inputs: {TYPE: STEP}`. `N` is a position in a list "
        "(from 0). What stands under `runtime` changes how a step runs, never what it makes.",
    ]
    stages = [key for key in every_stage().model_fields if key not in HEAD]
    sections = {"the recipe": HEAD, **{key: (key,) for key in stages}}
    known = settings()
    for title, keys in sections.items():
        rows = [
            (
                f"`{one.name}`",
                one.type,
                f"`{one.default}`" if one.default else "required",
                one.range,
                one.description,
            )
            for one in known
            if one.name.split(".")[0] in keys
        ]
        parts += [
            f"## {title}",
            table(("setting", "type", "default", "range", "what it does"), rows).rstrip(),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
