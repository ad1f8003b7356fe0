"""MLflow's knowledge of artifacts: which runs made or reused them, and which registered models descend from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from flows.engine.services import sqlite_url
from flows.listeners.mlflow.links import tracking_uri, without_secrets, without_user
from flows.listeners.mlflow.moved import follow_home

PAGE = 1000
FINGERPRINT = "llmill.fingerprint"
WEIGHTS = "llmill.weights"
KEY = "llmill.key"
PARENT = "mlflow.parentRunId"
OF_STEP = re.compile(r"llmill\.(?P<step>.+)\.fingerprint")
ARTIFACT = "llmill.artifact."
"""How the tags of a run begin that name an artifact (by fingerprint) of a step with a name of its own."""
Key = tuple[str, str]
"""Stage and fingerprint."""


class NotAsked(Exception):
    """MLflow does not answer, or there is none; the message says which."""


class NoRunYet(NotAsked):
    """The home has no MLflow, for nothing has run in it."""


@dataclass(frozen=True)
class SeenRun:
    """A run that made, reused or read an artifact."""

    run_id: str
    name: str
    status: str
    how: str
    """Part in the artifact in question: ``ran``, ``resumed``, ``reused``, ``dispatched``, or ``read`` as a dataset."""
    started: int
    """Milliseconds since 1970."""
    ended: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model that was exported here."""

    name: str
    version: str
    fingerprint: str
    """Fingerprint of the export; empty where neither its tags nor its run have it."""
    aliases: tuple[str, ...]
    ours: bool = False
    """Whether a run registered it by itself, as each does that exports; a person may have registered others."""

    @property
    def needed(self) -> bool:
        """Whether somebody relies on it: it has an alias, or was registered by hand. Others are former candidates."""
        return bool(self.aliases) or not self.ours

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    def __str__(self) -> str:
        return self.uri + (f" ({', '.join(self.aliases)})" if self.aliases else "")


class Records:
    """MLflow, asked.

    Raises:
        NotAsked: on each call, where it does not answer.
    """

    def __init__(self, home: Path, view: int = ViewType.ACTIVE_ONLY) -> None:
        self.uri = tracking_uri(home)
        if self.uri == sqlite_url(home.resolve() / "mlflow.db") and not (home / "mlflow.db").exists():
            raise NoRunYet(f"no run in {home} has reported to MLflow (there is no mlflow.db)")
        with self._asking():
            follow_home(home)
            self._client = MlflowClient(self.uri)
            found = self._paged(lambda token: self._client.search_experiments(view, page_token=token))
            self._experiments = [one.experiment_id for one in found]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except NotAsked:
            raise
        except Exception as error:  # MLflow lets errors of its database and its network through as they are
            message = without_secrets((str(error).splitlines() or [type(error).__name__])[0], self.uri)[:200]
            raise NotAsked(f"MLflow at {without_user(self.uri)} does not answer: {message}") from error

    @staticmethod
    def _paged(ask: Callable[[str | None], Any]) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = ask(token)
            yield from page
            token = page.token
            if not token:
                return

    def _runs(self, condition: str, view: int = ViewType.ACTIVE_ONLY) -> Iterator[Run]:
        if self._experiments:
            yield from self._paged(
                lambda token: self._client.search_runs(
                    self._experiments, condition, view, max_results=PAGE, page_token=token
                )
            )

    def runs_of(self, stage: str, fingerprint: str) -> list[SeenRun]:
        """The runs that refer to an artifact, oldest first: by their tags, or as a dataset that they read."""
        found: dict[str, SeenRun] = {}
        conditions = (
            f"tags.`llmill.{stage}.fingerprint` = '{fingerprint}'",
            f"tags.`{ARTIFACT}{fingerprint}` LIKE '%'",
            f"tags.`{FINGERPRINT}` = '{fingerprint}'",
            f"datasets.digest = '{fingerprint}'",
        )
        with self._asking():
            for condition in conditions:
                for run in self._runs(condition):
                    step = run.data.tags.get(f"{ARTIFACT}{fingerprint}", stage)
                    how = run.data.tags.get(f"llmill.{step}.how", "read" if "digest" in condition else "ran")
                    info = run.info
                    seen = SeenRun(
                        run_id=info.run_id,
                        name=info.run_name,
                        status=info.status,
                        how=how,
                        started=info.start_time,
                        ended=info.end_time,
                    )
                    found.setdefault(info.run_id, seen)
        return sorted(found.values(), key=lambda run: (run.started, run.run_id))

    def used_since(self, since: int) -> set[Key]:
        """The artifacts that runs refer to which began or ended at ``since`` (milliseconds since 1970) or later."""
        used: set[Key] = set()
        with self._asking():
            for time in ("start_time", "end_time"):
                for run in self._runs(f"attributes.{time} >= {since}"):
                    used.update(artifacts_of(run.data.tags))
        return used

    def knows_one_of(self, runs: Iterable[tuple[str, str]]) -> bool:
        """Whether this MLflow has one of these runs: by id, deleted or not, or by key where no id was known."""
        with self._asking():
            for run_id, key in runs:
                if not run_id:
                    if any(self._runs(f"tags.`{KEY}` = '{key}'")):
                        return True
                    continue
                try:
                    self._client.get_run(run_id)
                    return True
                except Exception as error:
                    if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                        raise
        return False

    def versions(self) -> list[ModelVersion]:
        """All versions of registered models that were exported by llmill, and those that record no maker."""
        with self._asking():
            aliases: dict[Key, list[str]] = {}
            for model in self._paged(lambda token: self._client.search_registered_models(page_token=token)):
                for alias, version in model.aliases.items():
                    aliases.setdefault((model.name, str(version)), []).append(alias)
            found = self._paged(lambda token: self._client.search_model_versions(page_token=token))
            versions = [
                ModelVersion(
                    name=one.name,
                    version=str(one.version),
                    fingerprint=one.tags.get(FINGERPRINT) or self._exported_by(one.run_id),
                    aliases=tuple(sorted(aliases.get((one.name, str(one.version)), []))),
                    ours=WEIGHTS in one.tags,
                )
                for one in found
            ]
        return sorted(versions, key=lambda one: (one.name, int(one.version)))

    def _exported_by(self, run_id: str | None) -> str:
        """The export that a run made or reused: for versions that somebody registered by hand."""
        if not run_id:
            return ""
        try:
            tags = self._client.get_run(run_id).data.tags
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return ""
            raise
        return dict(artifacts_of(tags)).get("export", "")

    def version(self, name: str, version: str) -> ModelVersion | None:
        """One version of a registered model, by number or by alias."""
        wanted = version.removeprefix("@")
        for one in self.versions():
            if one.name == name and wanted in (one.version, *one.aliases):
                return one
        return None


def artifacts_of(tags: dict[str, str]) -> Iterator[Key]:
    """The artifacts that a run's tags refer to: a step's own, or each step's of a whole run."""
    if "llmill.stage" in tags and FINGERPRINT in tags:
        yield tags["llmill.stage"], tags[FINGERPRINT]
    yield from steps_of(tags).values()


def steps_of(tags: dict[str, str]) -> dict[str, Key]:
    """Step -> artifact, as the tags of a whole run name them."""
    found = (OF_STEP.fullmatch(tag) for tag in tags)
    return {
        one["step"]: (tags.get(f"llmill.{one['step']}.stage", one["step"]), tags[one.string])
        for one in found
        if one
    }
