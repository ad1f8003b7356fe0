"""A comparison in MLflow: a run of its own, with the page and the metrics as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flows.compare.compare import Comparison
from flows.compare.page import page
from flows.listeners.markdown import link, plain
from flows.listeners.mlflow.findings import Finding

MOST_IN_NAME = 4
PAGE, DATA = "compare.html", "compare.json"


def log(comparison: Comparison, home: Path) -> tuple[str, str]:
    """Write it down; returns where it is, and why MLflow does not have it yet."""
    recipe = comparison.subjects[0].recipe
    names = [one.name for one in comparison.subjects]
    more = f" and {len(names) - MOST_IN_NAME} more" if len(names) > MOST_IN_NAME else ""
    finding = Finding(home, recipe, "compare", f"compare {' vs '.join(names[:MOST_IN_NAME])}{more}")
    runs = [one.run.run_id for one in comparison.subjects if one.run]
    tags = {"llmill.compare.runs": ",".join(runs)}
    why_not = finding.report(tags, files(comparison), note(comparison), "FINISHED")
    return finding.link, why_not


def files(comparison: Comparison) -> Mapping[str, str]:
    told = comparison.for_mlflow
    return {PAGE: page(told), DATA: json.dumps(told.as_json(), indent=1, allow_nan=False)}


def note(comparison: Comparison) -> str:
    """The verdict and links to the runs, in Markdown."""
    verdict = comparison.verdict
    lines = [
        f"**Models**: {plain(verdict.about_models)}",
        "",
        f"**Recipes**: {plain(verdict.about_recipes)}",
        "",
        *(f"**Warning**: {plain(warning)}\n" for warning in comparison.warnings),
    ]
    for one in comparison.subjects:
        name = link(one.name, one.run.url) if one.run and one.run.url else plain(one.name)
        lines.append(f"- {one.label}: {name}" + (f" `{one.run.run_id}`" if one.run else ""))
    if verdict.about_fixed and not verdict.refused:  # else it stands with the models
        lines += ["", f"**Sets and tasks**: {plain(verdict.about_fixed)}"]
    return "\n".join([*lines, "", f"The whole comparison is in `{PAGE}`."])
