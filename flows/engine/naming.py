"""The name of a run: what was set, and when, such as ``lr=1e-3 seed=1 · 11-29 10:36``. Prefect, MLflow and the terminal
have the same one, and a run that resumes another keeps that one's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

from flows.engine.continuation import Continuation, plan_id
from flows.engine.plan import Planned, Step
from flows.recipe import shown

TIME = "%m-%d %H:%M"
MOST = 60
"""Characters of what was set."""
MOST_DIFFERENCES = 3
"""Differences from the nearest sealed steps, above which the run is no variant of what made those."""
LONG_VALUE = 24
"""Characters from which on a value is passed over: a hash, a path or a list tells nobody anything in a name."""
DIFFERENCE = re.compile(r"([\w.]+): .* -> (.*)")


def name_run(planned: Planned, settings: Sequence[str], given: str = "") -> str:
    """Name a run of a plan: as a person does, as the run that it resumes, or after what was set."""
    known = Continuation(planned.uses.store.home).name_of(plan_id(planned.recipe, planned.steps))
    return given or known or dated(in_words(settings) or differing(planned.steps) or planned.recipe.name)


def dated(name: str) -> str:
    return f"{name} · {datetime.now():{TIME}}"


def in_words(settings: Iterable[str]) -> str:
    """Say what ``step.field=value`` settings set, without those that change no output: ``lr=1e-3 seed=1``."""
    pairs = [shown(setting).partition("=") for setting in settings]
    return joined((key, value) for key, _, value in pairs if "runtime" not in key.split("."))


def differing(steps: Sequence[Step]) -> str:
    """Say in what the steps to be built differ from the nearest that are sealed; not where that is another thing."""
    lines = [line for step in steps if step.action in ("run", "resume") for line in step.why]
    found = [one.groups() for line in lines if (one := DIFFERENCE.fullmatch(line))]
    return joined(found) if len(found) <= MOST_DIFFERENCES else ""


def joined(pairs: Iterable[Sequence[str]]) -> str:
    """Join keys and values, each key by its last words that tell it from the others, as far as there is room."""
    short = [(key, value) for key, value in pairs if len(value) <= LONG_VALUE]
    last = Counter(key.rpartition(".")[2] for key, _ in short)
    text = ""
    for key, value in short:
        name = key.rpartition(".")[2]
        more = f"{name if last[name] == 1 else key}={value}"
        if len(text) + len(more) > MOST:
            return f"{text} …".strip()
        text = f"{text} {more}".strip()
    return text
