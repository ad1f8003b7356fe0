"""What the shell offers behind a half-typed word; asked for by ``llmill --install-completion``."""

from __future__ import annotations

from glob import escape, glob
from pathlib import Path


def recipes(incomplete: str) -> list[str]:
    """Recipes that begin so: files and folders here, and those that come with llmill."""
    from flows.recipe import shipped_recipes

    found = [f"{path}/" if Path(path).is_dir() else path for path in sorted(glob(f"{escape(incomplete)}*"))]
    here = [path for path in found if path.endswith(("/", ".yaml", ".yml"))]
    return here or [path for path in shipped_recipes() if path.startswith(incomplete)]


def stages(incomplete: str) -> list[str]:
    """Stages whose names begin so."""
    from flows.stages import BY_NAME

    return [name for name in BY_NAME if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """Settings, and groups of them, whose names begin so."""
    from flows.settings import group_names

    return [name for name in group_names() if name.startswith(incomplete)]


def overrides(incomplete: str) -> list[str]:
    """``STAGE.FIELD=`` of each setting that begins so; behind the ``=``, the values of one that has few."""
    from flows.settings import settings as known

    name, equals, value = incomplete.partition("=")
    if not equals:
        # The first source of a list is what there mostly is.
        return [
            typed for one in known() if (typed := f"{one.name.replace('.N', '.0')}=").startswith(incomplete)
        ]
    choices = [one.choices for one in known() if one.name.replace(".N", ".0") == name]
    return [f"{name}={choice}" for choice in sum(choices, ()) if choice.startswith(value)]
