"""Whole runs of recipes as MLflow remembers them, for whoever names one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlflow.entities import Run

from flows.headline import BITS
from flows.listeners.mlflow.lineage import KEY, PAGE, PARENT, Key, Records, steps_of
from flows.listeners.mlflow.links import run_url, table_url
from flows.listeners.mlflow.view import TAG

EVALUATED = ("llmill.evaluate.fingerprint", "llmill.evaluated")
"""Tags of runs that evaluated a model: in the step of that name, and in others."""
OF_RECIPES = "tags.`llmill.recipe` LIKE '%' AND tags.`llmill.stage` IS NULL AND tags.`llmill.kind` IS NULL"
"""Neither steps nor comparisons, sweeps, decisions."""


@dataclass(frozen=True)
class PipelineRun:
    """A run of a recipe."""

    run_id: str
    name: str
    recipe: str
    started: int
    """Milliseconds since 1970."""
    artifacts: dict[str, Key]
    """Step -> the artifact that it made or reused."""
    url: str
    """Address of its page; empty where no server shows it."""


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run of a recipe with all that is shown of it among others."""

    run: PipelineRun
    key: str
    state: str
    """``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``."""
    ended: int | None
    """Milliseconds since 1970."""
    params: dict[str, str]
    bits_per_byte: dict[str, float]
    """Scores by the step that evaluated."""
    prefect_url: str
    """The page of its flow run; the server may be gone that showed it."""


class PipelineRuns(Records):
    """MLflow, asked about runs of recipes.

    Raises:
        NotAsked: on each call, where it does not answer.
    """

    def newest(self) -> list[PipelineRun]:
        """The runs that came as far as an evaluation, the newest first."""
        with self._asking():
            found = {
                run.info.run_id: self._pipeline(run)
                for tag in EVALUATED
                for run in self._runs(f"tags.`{tag}` LIKE '%'")
            }
        return sorted(found.values(), key=lambda run: (-run.started, run.run_id))

    def called(self, text: str) -> list[PipelineRun]:
        """Those whose name is ``text`` or whose id, or a step's within, begins so (with six digits at least)."""
        conditions = [] if set(text) & set("'\"`\\") else [f"attributes.run_name = '{text}'"]
        if re.fullmatch(r"[0-9a-f]{6,32}", text):
            conditions.append(f"attributes.run_id LIKE '{text}%'")
        found: dict[str, PipelineRun] = {}
        with self._asking():
            for run in [run for condition in conditions for run in self._runs(condition)]:
                whole = self._whole(run)
                found[whole.info.run_id] = self._pipeline(whole)
        return list(found.values())

    def listed(self) -> list[ListedRun]:
        """All runs of recipes, however far they came, the newest first."""
        with self._asking():
            found = [self._listed(run) for run in self._runs(OF_RECIPES)]
        return sorted(found, key=lambda one: (-one.run.started, one.run.run_id))

    def of_key(self, key: str) -> PipelineRun | None:
        """The run that its tracker calls so; None where MLflow does not know it yet."""
        with self._asking():
            found = [self._pipeline(run) for run in self._runs(f"tags.`{KEY}` = '{key}'")]
        return found[0] if found else None

    def _listed(self, run: Run) -> ListedRun:
        whole, tags, metrics = self._pipeline(run), run.data.tags, run.data.metrics
        scores = {
            step: metrics[f"{step}/{BITS}"]
            for step, (stage, _) in sorted(whole.artifacts.items())
            if stage == "evaluate" and f"{step}/{BITS}" in metrics
        }
        return ListedRun(
            run=whole,
            key=tags.get(KEY, ""),
            state=run.info.status,
            ended=run.info.end_time,
            params=dict(run.data.params),
            bits_per_byte=scores,
            prefect_url=tags.get("llmill.prefect_url", ""),
        )

    def views(self, pages: str) -> dict[str, str]:
        """Recipe -> the address under ``pages`` that shows its runs, the last used first."""
        with self._asking():
            order = ["last_update_time DESC"]
            found = self._client.search_experiments(order_by=order, max_results=PAGE)
        return {one.name: table_url(pages, one.experiment_id) for one in found if TAG in one.tags}

    def _whole(self, run: Run) -> Run:
        """The run itself, or the one that a step's run belongs to."""
        parent = run.data.tags.get(PARENT)
        return self._client.get_run(parent) if "llmill.stage" in run.data.tags and parent else run

    def _pipeline(self, run: Run) -> PipelineRun:
        info, tags = run.info, run.data.tags
        return PipelineRun(
            run_id=info.run_id,
            name=info.run_name,
            recipe=tags.get("llmill.recipe", ""),
            started=info.start_time,
            artifacts=steps_of(tags),
            url=run_url(self.uri, info.experiment_id, info.run_id),
        )
