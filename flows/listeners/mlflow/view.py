"""The view of an experiment's runs that every link of llmill opens in MLflow's pages: columns, order, charts.

MLflow keeps a saved view as JSON in a tag of the experiment; what the JSON may hold is written nowhere but in the
source of its pages (`ExperimentPageUIState.tsx`, `runs-charts.types.ts`), so a test looks at it in a browser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from flows.listeners.mlflow.links import VIEW
from flows.stages import DEFAULT

VERSION = 2
"""To be raised with each change of the view: an experiment that has an older one is given the new one."""
TAG = f"mlflow.sharedViewState.{VIEW}"
OTHER_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # MLflow 3.17 goes by the browser's mode, others by this
    "mlflow.experiment.primaryMetric.name": "evaluate/bits_per_byte",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
}
COLOR = "mlflow.runColor"
COLORS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
"""Colours of runs, one after the other: those that MLflow chooses by a run's id are often the same of two."""
COLUMNS = {
    "metrics": (
        "evaluate/bits_per_byte",
        "pretrain/loss",
        "tokenize/train_tokens",
        "seconds",
    ),
    "params": ("pretrain.lr", "pretrain.tokens", "pretrain.batch_tokens", "pretrain.seed"),
    "attributes": ("Description",),
}
"""The columns by which runs of one recipe are told apart, beside name, state and time, which are always there."""
WIDTHS = {f"{kind}.`{name}`": 20 + 7 * len(name) for kind, names in COLUMNS.items() for name in names}
WIDTHS["attributes.`Description`"] = 400
"""Column -> pixels, so that each name is read whole and all but the description fit beside each other."""
RUNS = "tags.`llmill.stage` IS NULL"
"""The filter that leaves out the runs of steps: MLflow folds them under their run only where it sorts by time."""
QUALITY, SPEED = "Loss and bits per byte, over tokens and over steps", "Speed and machine"
SCORES = "Sets and tasks, scored while training, over tokens"
TIME = "time-relative"

Chart = dict[str, Any]


def curve(section: str, metric: str, axis: str = "step") -> Chart:
    """A chart with one line a run; MLflow's title of it is the metric."""
    return chart("LINE", section, metric) | {
        "xAxisKey": axis,
        "useGlobalXaxisKey": False,
        "lineSmoothness": 0,
    }


def chart(kind: str, section: str, metric: str) -> Chart:
    """A chart of one of MLflow's kinds."""
    return {"type": kind, "uuid": f"{kind}{metric}", "metricSectionId": section, "metricKey": metric}


DIFFERENCES: Chart = {
    "compareGroups": ["Parameters"],
    "chartName": "What was set differently",
    "showDifferencesOnly": True,
    "showChangeFromBaseline": False,
    "baselineColumnUuid": "",
}
CHARTS = (
    chart("BAR", QUALITY, "evaluate/bits_per_byte"),
    curve(QUALITY, "tokens/train_loss"),
    curve(QUALITY, "tokens/val_bits_per_byte"),
    chart("DIFFERENCE", QUALITY, "") | DIFFERENCES,
    curve(QUALITY, "train/loss"),
    curve(QUALITY, "val/bits_per_byte"),
    curve(SPEED, "train/tokens_per_second"),
    curve(SPEED, "system/cpu_utilization_percentage", TIME),
    curve(SPEED, "system/system_memory_usage_megabytes", TIME),
    curve(SPEED, "system/gpu_0_utilization_percentage", TIME),
    curve(SPEED, "system/gpu_0_memory_usage_megabytes", TIME),
)
"""MLflow hides a chart for which no run has figures, such as those of GPUs on a machine without."""


def section(name: str) -> dict[str, Any]:
    """An open section, two charts wide: three beside the list of runs are too narrow to be read."""
    return closed_section(name) | {"display": True, "columns": 2, "cardHeight": 300}


def closed_section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": False}


def state() -> dict[str, Any]:
    """The view as MLflow's pages read it.

    The best run is first, and charts are of the first twenty: that answers which run is best. MLflow adds a chart of
    every other metric, in a section named by what stands before the slash; those of the steps are there, and closed.
    """
    return {
        "searchFilter": RUNS,
        "orderByKey": "metrics.`evaluate/bits_per_byte`",
        "orderByAsc": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "selectedColumns": [*WIDTHS],
        "columnOrder": [*WIDTHS],
        "columnWidths": WIDTHS,
        "compareRunCharts": list(CHARTS),
        "compareRunSections": [
            *(section(name) for name in (QUALITY, SPEED)),
            *(closed_section(name) for name in (*DEFAULT, "train", "val", "tokens", "")),
        ],
        "isAccordionReordered": True,
    }


def saved_view(now: int) -> str:
    """The value of `TAG`, made at ``now`` (milliseconds of the epoch)."""
    view = {"name": VIEW, "version": VERSION, "createdAt": now, "updatedAt": now}
    return in_json(view, state())


def in_json(view: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """A view with its state, as MLflow keeps them: JSON within JSON."""
    compact = json.dumps(state, allow_nan=False, separators=(",", ":"))
    return json.dumps({**view, "state": compact}, allow_nan=False)


def with_scores(value: str, metrics: Iterable[str]) -> str:
    """Return a value of `TAG` with a curve of each metric, in a section of their own; ``value`` where it has them all.

    They go by the names of sets and tasks, which a view that is made before any training does not know.
    """
    view = json.loads(value)
    state = json.loads(view["state"])
    known = {one["uuid"] for one in state["compareRunCharts"]}
    new = [one for name in sorted(metrics) if (one := curve(SCORES, name))["uuid"] not in known]
    if not new:
        return value
    state["compareRunCharts"] += new
    if all(one["uuid"] != SCORES for one in state["compareRunSections"]):
        state["compareRunSections"].insert(1, section(SCORES))
    return in_json(view, state)


def missing_tags(tags: Mapping[str, str], now: int) -> dict[str, str]:
    """The tags that an experiment with these ones lacks: what a person has changed stays, an older view does not."""
    view = {TAG: saved_view(now)} if is_older(tags.get(TAG, "")) else {}
    return view | {name: value for name, value in OTHER_TAGS.items() if name not in tags}


def next_color(color: str | None) -> str:
    """Return the colour of the run after one with this colour."""
    return COLORS[(COLORS.index(color) + 1) % len(COLORS)] if color in COLORS else COLORS[0]


def is_older(value: str) -> bool:
    """Whether a value of `TAG` was written by an earlier llmill (or is damaged)."""
    try:
        view = json.loads(value)
        return not isinstance(view, Mapping) or view.get("version", 0) < VERSION
    except (ValueError, TypeError):
        return True
