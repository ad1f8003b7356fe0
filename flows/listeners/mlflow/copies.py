"""Copies of artifacts in MLflow: the files and the page of each step's run, logged models, registered versions.

What `llmill gc` removes from the store goes from there too, on whatever store MLflow keeps files. Params, metrics and
tags of the runs stay: they record that there was an artifact, and what it was made from, with its checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mlflow.entities import LoggedModel, Run, ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from flows.listeners.mlflow.description import FAILED, NOTE, SAMPLES, without_texts
from flows.listeners.mlflow.lineage import (
    FINGERPRINT,
    Key,
    ModelVersion,
    NotAsked,
    Records,
    artifacts_of,
    steps_of,
)
from flows.listeners.mlflow.links import HOME, target
from flows.listeners.mlflow.samples import TABLES, samples_of, tables_of, tables_tag
from flows.listeners.mlflow.translate import ERROR
from flows.listeners.mlflow.uploads import FILES

REMOVED = "removed by llmill gc"
"""How the tag begins that says why a run has no files."""


@dataclass(frozen=True)
class Copy:
    """Something that MLflow holds of an artifact."""

    name: str
    """``run 8f1c0a...``, ``page of run ...``, ``model m-...`` or ``models:/NAME/VERSION``."""
    take_away: Callable[[], None]
    """Removes it; once more does no harm."""


class Copies(Records):
    """All that MLflow holds of artifacts, of deleted runs and experiments too.

    Raises:
        NotAsked: on each call, where it does not answer.
    """

    def __init__(self, home: Path) -> None:
        super().__init__(home, ViewType.ALL)
        self._home = home
        self._held: dict[Key, list[Copy]] = {}
        self._made: dict[str, set[Key]] = {}
        versions = self.versions()
        with self._asking():
            for run in self._runs("tags.`llmill.recipe` LIKE '%'", ViewType.ALL):
                self._note_run(run)
            for model in self._models():
                stage = "export" if model.model_type == "export" else "pretrain"
                remove = partial(self._forget, model)
                self._hold((stage, model.tags[FINGERPRINT]), f"model {model.model_id}", remove)
        for version in versions:
            remove = partial(self._unregister, version)
            self._hold(("export", version.fingerprint), version.uri, remove)

    def of(self, key: Key) -> list[Copy]:
        """Return the copies of an artifact."""
        return self._held.get(key, [])

    def descendants(self, keys: Iterable[Key]) -> set[Key]:
        """Return what was made from artifacts, as runs name what they read; also where the store no longer has it."""
        found: set[Key] = set()
        waiting = list(keys)
        while waiting:
            more = self._made.get(waiting.pop()[1], set()) - found
            found |= more
            waiting += more
        return found

    def named(self, fingerprint: str) -> list[Key]:
        """The artifacts whose fingerprint begins so, of which there is a copy."""
        return [key for key in self._held if key[1].startswith(fingerprint)]

    def take_away(self, key: Key) -> None:
        """Remove all that there is of an artifact."""
        with self._asking():
            for copy in self.of(key):
                copy.take_away()

    def everything(self) -> Iterator[tuple[str, list[str], str]]:
        """Each run and each logged model: its name, the texts on its page, and where its files are."""
        with self._asking():
            for run in self._runs("", ViewType.ALL):
                texts = [*run.data.tags.values(), *run.data.params.values()]
                yield f"run {run.info.run_id}", texts, run.info.artifact_uri
            for model in self._models():
                yield f"model {model.model_id}", [*model.tags.values()], model.artifact_location

    def fetch(self, place: str, folder: Path) -> None:
        """Download all files of a run or a model."""
        with self._asking():
            repository = get_artifact_repository(place, tracking_uri=self.uri)
            if repository.list_artifacts():
                repository.download_artifacts("", str(folder))

    def _note_run(self, run: Run) -> None:
        tags = run.data.tags
        keys = list(artifacts_of(tags))
        if "llmill.stage" in tags:
            for one in run.inputs.dataset_inputs if run.inputs else ():
                self._made.setdefault(one.dataset.digest, set()).update(keys)
            if not tags.get(FILES, "").startswith(REMOVED):
                for key in keys:
                    self._hold(key, f"run {run.info.run_id}", partial(self._empty, run))
            return
        for step, key in steps_of(tags).items():
            if samples_of(step) in tables_of(tags):
                remove = partial(self._drop_table, run, samples_of(step))
                self._hold(key, f"samples of run {run.info.run_id}", remove)
        note = tags.get(NOTE, "")
        for key in keys:
            if FAILED in note or (SAMPLES in note and key[0] == "evaluate"):
                self._hold(key, f"page of run {run.info.run_id}", partial(self._shorten, run))

    def _hold(self, key: Key, name: str, remove: Callable[[], None]) -> None:
        self._held.setdefault(key, []).append(Copy(name, remove))

    def _models(self) -> Iterator[LoggedModel]:
        if self._experiments:
            found = self._paged(
                lambda token: self._client.search_logged_models(self._experiments, page_token=token)
            )
            yield from (model for model in found if FINGERPRINT in model.tags)

    def _empty(self, run: Run) -> None:
        """Remove a run's files, and what quotes them on its page."""
        self._delete_files(run.info.artifact_uri)
        self._retag(
            run, {NOTE: None, ERROR: None, TABLES: None, FILES: f"{REMOVED} on {datetime.now(UTC):%Y-%m-%d}"}
        )

    def _drop_table(self, run: Run, name: str) -> None:
        """Remove one file of a run."""
        self._delete_files(run.info.artifact_uri, name)
        tables = tables_of(self._client.get_run(run.info.run_id).data.tags)
        left = [one for one in tables if one != name]
        self._retag(run, {TABLES: tables_tag(left) if left else None})

    def _shorten(self, run: Run) -> None:
        self._retag(run, {NOTE: without_texts(run.data.tags[NOTE])})

    def _retag(self, run: Run, tags: dict[str, str | None]) -> None:
        """Change tags of a run, which may be a deleted one."""
        run_id, deleted = run.info.run_id, run.info.lifecycle_stage == "deleted"
        if deleted:
            self._client.restore_run(run_id)
        try:
            there = self._client.get_run(run_id).data.tags
            for name, value in tags.items():
                if value is not None:
                    self._client.set_tag(run_id, name, value)
                elif name in there:
                    self._client.delete_tag(run_id, name)
        finally:
            if deleted:
                self._client.delete_run(run_id)

    def _forget(self, model: LoggedModel) -> None:
        self._delete_files(model.artifact_location)
        self._client.delete_logged_model(model.model_id)

    def _unregister(self, version: ModelVersion) -> None:
        self._client.delete_model_version(version.name, version.version)

    def _delete_files(self, place: str, name: str | None = None) -> None:
        ours = f"{self._home.resolve().as_uri()}/"
        if place.startswith("file:") and target(self._home) == HOME and not place.startswith(ours):
            raise NotAsked(f"{place} is not in this home: another one, of which this is a copy, has it")
        get_artifact_repository(place, tracking_uri=self.uri).delete_artifacts(name)
