"""The base of all configurations, and how raw numbers are read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

EXPONENT = re.compile(r"[+-]?\d[\d_]*(\.\d*)?e[+-]?\d+", re.IGNORECASE)
"""Numbers that YAML 1.1 and pydantic's integers do not take for what they are."""


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: read_numbers(value, leaf_types(fields[key].annotation)) if key in fields else value
            for key, value in values.items()
        }


def read_numbers(value: Any, types: frozenset[Any]) -> Any:
    """Make the numbers in a raw value of a field of ``types`` numbers, by one rule, wherever they were written.

    YAML reads ``2e5`` and ``1e-3`` as text. And pydantic takes true for 1: where a number is wanted it becomes text,
    which is refused in its place.
    """
    if not types & {int, float}:
        return value
    if isinstance(value, list | tuple):
        return type(value)(read_numbers(one, types) for one in value)
    if isinstance(value, dict):
        return {key: read_numbers(one, types) for key, one in value.items()}
    if isinstance(value, bool) and bool not in types:
        return str(value).lower()
    if isinstance(value, str) and str not in types and EXPONENT.fullmatch(value.strip()):
        return float(value)
    return value


def leaf_types(annotation: Any) -> frozenset[Any]:
    """Return the types that values of an annotation consist of: ``dict[str, float] | None`` gives float and None."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return frozenset()
    if origin is Annotated:
        args = args[:1]
    elif origin is dict:
        args = args[1:]
    return frozenset().union(*map(leaf_types, args)) if args else frozenset({annotation})
