"""The form of a deployment: the steps that its recipe has, and the recipe's settings as fields, grouped by step.

A form sends what it shows in each field, touched or not. So a deployment keeps out of sight what its fields began with
(the parameter `defaults`), and only what differs from that is a setting of the run: what nobody touched is as the
recipe's file says when the run starts, or is retried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import yaml

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from flows.recipe import Loader, Recipe, is_of, shown
from flows.settings import Setting, of_model

OTHERS = "other settings"
"""The group of a step's fields that is closed at first; no setting's name has a space."""
CLOSED = {"title": "as in the recipe", "type": "null"}
SCALARS = ("string", "integer", "number", "boolean")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
EXACT = 2**53
"""Larger integers are rounded by a browser, and from 2^64 on refused by Prefect's server."""
MAIN_OF_RUNTIME = ("workers", "parallel_steps")

Schema = dict[str, Any]
Fields = Mapping[str, Mapping[str, Any]]
"""Step, or `runtime` -> name of a setting -> value; under `OTHERS` the same of the group that is closed at first."""


def offer_steps(schema: Schema, steps: Sequence[str]) -> None:
    """Have a deployment's schema offer the steps of its recipe: the flow itself, which all recipes share, has none."""
    step = {"type": "string", "enum": list(steps)}
    for name, chosen in schema["definitions"]["Stages"]["properties"].items():
        chosen |= {"title": name, "anyOf": [step, {"type": "null"}]}
    schema["properties"]["dispatch"]["items"] = step


def offer_settings(schema: Schema, recipe: Recipe, only: str | None = None) -> dict[str, Any]:
    """Have a deployment's schema offer a recipe's settings, those of the step that runs alone or of all.

    Returns:
        Setting -> what its field shows; to be kept as the deployment's parameter `defaults`.
    """
    groups: dict[str, tuple[Config, Sequence[str]]] = {
        one.name: (one.config, one.stage.main) for one in recipe.steps if only in (None, one.name)
    }
    defaults: dict[str, Any] = {}
    properties: Schema = {}
    for name, (config, main) in {**groups, "runtime": (recipe.runtime, MAIN_OF_RUNTIME)}.items():
        fields = dict(fields_of(name, config))
        defaults |= {f"{name}.{key}": one["default"] for key, one in fields.items() if "default" in one}
        properties[name] = group(name, fields, main or tuple(fields), schema["definitions"])
    schema["properties"].pop("defaults", None)
    schema["properties"]["config"] |= object_of("config", numbered(properties))
    return defaults


def group(name: str, fields: Mapping[str, Schema], main: Sequence[str], definitions: Schema) -> Schema:
    """Return the schema of a step's fields; those that are not among the ``main`` ones stand in ``definitions``."""
    shown_at_once = {key: fields[key] for key in main if key in fields}
    others = {key: field for key, field in fields.items() if key not in main}
    if others:
        definitions[f"{name}.others"] = object_of("open", numbered(others))
        inside = {"$ref": f"#/definitions/{name}.others"}
        # A form shows one of anyOf, at first the first; `then` adds to a mistake in there which field it is.
        choice = {"anyOf": [CLOSED, inside], "if": {"type": "object"}, "then": inside}
        shown_at_once[OTHERS] = {"title": OTHERS, **choice}
    return object_of(name, numbered(shown_at_once))


def object_of(title: str, properties: Schema) -> Schema:
    return {"title": title, "type": "object", "properties": properties, "additionalProperties": False}


def numbered(properties: Mapping[str, Schema]) -> Schema:
    """Number properties, for PostgreSQL keeps no order of keys."""
    return {name: {**one, "position": place} for place, (name, one) in enumerate(properties.items())}


def fields_of(step: str, config: Config) -> Iterator[tuple[str, Schema]]:
    """Yield the settings of a step that a field can ask for, with what the recipe says now as their default.

    Left to the list of settings are mappings, lists of more than plain values, and groups that the recipe leaves out.
    """
    for one in of_model(type(config), f"{step}."):
        name = one.name.removeprefix(f"{step}.")
        *within, key = name.split(".")
        holder: Any = config
        for part in within:
            holder = getattr(holder, part, None)
        if not isinstance(holder, Config):
            continue
        described = schema_of(type(holder))
        if field := plain(described["properties"][key], described.get("$defs", {})):
            value = holder.model_dump(mode="json", include={key})[key]
            yield name, field | labels(one, name) | ({"default": value} if may_show(one.name, value) else {})


@cache
def schema_of(config: type[Config]) -> Schema:
    return config.model_json_schema()


def plain(schema: Schema, definitions: Mapping[str, Schema]) -> Schema | None:
    """Return the schema of a value, or list of values, that a field takes; None where it takes no such thing.

    Null is no value of a field: an empty one leaves what the recipe says.
    """
    kinds = [named(one, definitions) for one in named(schema, definitions).get("anyOf", [schema])]
    kinds = [bounded(named(one, definitions)) for one in kinds if one.get("type") != "null"]
    if all("enum" in one for one in kinds):
        return {"type": "string", "enum": [value for one in kinds for value in one["enum"]]}
    if all(one.get("type") in SCALARS for one in kinds):
        return kinds[0] if len(kinds) == 1 else {"anyOf": [{**one, "title": tab(one)} for one in kinds]}
    items = kinds[0].get("items", {})
    return kinds[0] if len(kinds) == 1 and items.get("type") in SCALARS else None


def tab(kind: Schema) -> str:
    """Name one of the kinds of value that a field takes."""
    return ", ".join(kind.get("enum", [kind["type"]]))


def named(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """Return a schema, or what it refers to."""
    return definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def bounded(schema: Schema) -> Schema:
    """Return a schema without Pydantic's title and bounds out of reach, an only value as a choice of one."""
    kept = {key: value for key, value in schema.items() if key not in ("title", "default", "const")}
    kept = {key: value for key, value in kept.items() if key not in BOUNDS or abs(value) <= EXACT}
    return kept | {"enum": [schema["const"]]} if "const" in schema else kept


def labels(setting: Setting, name: str) -> Schema:
    """Return the name of a field and its help."""
    limits = f"Range: {setting.range}." if setting.range else ""
    return {"title": name, "description": f"{setting.description} {limits}".strip()}


def may_show(setting: str, value: Any) -> bool:
    """Whether Prefect may keep a value, and a field show it: it is one, no secret, and no browser rounds it."""
    if value is None or (isinstance(value, int) and abs(value) > EXACT):
        return False
    text = f"{setting}={written(value)}"
    return shown(text) == text


def changed(config: Fields, defaults: Mapping[str, Any]) -> list[str]:
    """Write as ``step.field=value`` what a form's fields say otherwise than at first."""
    return [
        f"{step}.{name}={written(value)}"
        for step, fields in without_defaults(config, defaults).items()
        for name, value in ({**fields, **fields.get(OTHERS, {})}).items()
        if name != OTHERS
    ]


def settings_in(parameters: Mapping[str, Any]) -> list[str]:
    """List the settings of a flow run: those that are listed, and those that fields of the form were changed to."""
    fields = changed(parameters.get("config") or {}, parameters.get("defaults") or {})
    return [*(parameters.get("settings") or ()), *fields]


def without_defaults(config: Fields, defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the fields that differ from what they showed at first."""
    kept = {step: differing(step, fields, defaults) for step, fields in config.items()}
    return {step: fields for step, fields in kept.items() if fields}


def differing(step: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a step's fields that differ from what they showed at first."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name == OTHERS:
            kept |= {OTHERS: others} if (others := differing(step, value or {}, defaults)) else {}
        elif f"{step}.{name}" not in defaults or value != defaults[f"{step}.{name}"]:
            kept[name] = value
    return kept


def written(value: Any) -> str:
    """Write a value as `--set` reads it: text as it is, where it is read as that."""
    with suppress(yaml.YAMLError, ValueError):
        if isinstance(value, str) and yaml.load(value, Loader) == value:
            return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def together(settings: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Join the settings that are listed with those that fields were changed to.

    Raises:
        UserError: both name one.
    """
    for field in fields:
        name = field.partition("=")[0]
        if listed := next((one for one in settings if is_of(one.partition("=")[0], name, within=True)), None):
            both = f"its field says {shown(field)}, and settings {shown(listed)}"
            raise UserError(f"{name} is set twice: {both}; leave one out")
    return [*settings, *fields]
