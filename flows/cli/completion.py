"""Completions that the shell offers behind a half-typed word; asked for by ``llmill --install-completion``."""

from __future__ import annotations

from glob import escape, glob
from pathlib import Path

from typer import Context


def recipes(incomplete: str) -> list[str]:
    """Recipes that begin so: files and folders here, and those that come with llmill."""
    from flows.recipe import shipped_recipes

    found = [f"{path}/" if Path(path).is_dir() else path for path in sorted(glob(f"{escape(incomplete)}*"))]
    here = [path for path in found if path.endswith(("/", ".yaml", ".yml"))]
    return here or [path for path in shipped_recipes() if path.startswith(incomplete)]


def steps(ctx: Context, incomplete: str) -> list[str]:
    """Steps of the recipe that is typed before whose names begin so."""
    return [name for name in stages_of(ctx) if name.startswith(incomplete)]


def stages_of(ctx: Context) -> dict[str, str]:
    """Name -> stage of each step of the recipe that is typed; those of any recipe where there is none to read."""
    from flows.recipe import step_names

    typed = [ctx.params.get("recipe"), *ctx.args]  # an option that still lacks its value hides arguments
    return step_names(Path(next(filter(None, typed), "")))


def settings(incomplete: str) -> list[str]:
    """Settings, and groups of them, whose names begin so."""
    from flows.settings import group_names

    return [name for name in group_names() if name.startswith(incomplete)]


def overrides(ctx: Context, incomplete: str) -> list[str]:
    """``STEP.FIELD=`` of each setting that begins so; behind the ``=``, the values of one that has few."""
    from flows.settings import settings as known

    setting, equals, value = incomplete.partition("=")
    step = setting.partition(".")[0]
    stage = stages_of(ctx).get(step, step)
    # The first source of a list is what there mostly is.
    found = {one.name.replace(".N", ".0"): one.choices for one in known()}
    found = {
        name.replace(stage, step, 1) if f"{name}.".startswith(f"{stage}.") else name: choices
        for name, choices in found.items()
    }
    if not equals:
        return [f"{name}=" for name in found if name.startswith(incomplete)]
    return [f"{setting}={choice}" for choice in found.get(setting, ()) if choice.startswith(value)]
