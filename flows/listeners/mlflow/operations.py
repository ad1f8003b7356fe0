"""MLflow, to which operations are sent one at a time. Each can be sent any number of times, and is then there once.

A run is found by its tag `llmill.key`, or created with it; a point of a metric keeps its time and step, by which MLflow
knows it again; params, tags, datasets and files of the same name are the same.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException, RestException
from requests import HTTPError

from flows.engine.store import Damaged, Store, shared_lock
from flows.engine.training import EVENTS, read_lines
from flows.listeners.mlflow.description import NOTE, clipped, links, with_pages
from flows.listeners.mlflow.lineage import FINGERPRINT, KEY, PARENT
from flows.listeners.mlflow.links import (
    HOME,
    run_url,
    table_url,
    target,
    without_secrets,
    without_user,
)
from flows.listeners.mlflow.models import name_candidate
from flows.listeners.mlflow.moved import follow_home
from flows.listeners.mlflow.points import METRICS, SCORED, event_points
from flows.listeners.mlflow.samples import TABLES, tables_of, tables_tag
from flows.listeners.mlflow.translate import Operation
from flows.listeners.mlflow.uploads import FILES, UPLOADS, Refused
from flows.listeners.mlflow.view import COLOR, TAG, is_older, missing_tags, next_color, with_scores

logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # its failures are reported by whoever sends

ENTRIES = 100
"""Params, or tags, of a request: MLflow takes no more."""
LISTED = 50  # models of an artifact: a training logs twenty at most
LOG = "log"  # neighbouring params, tags and metrics of one run, sent together
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
REFUSING = {400, 413, 422}  # HTTP statuses of an artifact store
DOUBTS = (0.5, 2.0, 5.0)  # seconds before each further try of what fails while MLflow answers otherwise

Item = TypeVar("Item")


class Away(Exception):
    """MLflow does not answer, or not as MLflow; the message says how."""


class Gone(Away):
    """The experiment was deleted; the message says how to have it again. What is to be reported to it waits."""


class Mlflow:
    """A tracking server or database. All its calls come from one thread."""

    def __init__(self, home: Path, uri: str) -> None:
        self.home, self.uri = home, uri
        self.ids: dict[str, str] = {}
        """Key of a run -> its id, of those that were asked for."""
        self.experiments: dict[str, str] = {}
        self.fresh: set[str] = set()
        """Keys that this process has just made up: MLflow can have no run of theirs yet, and is not asked for one."""
        self.uploading = False
        self.drawn: set[tuple[str, str]] = set()
        """Experiments and scores of theirs that this process has seen to be drawn."""
        self._connected: MlflowClient | None = None
        self._unsure: set[str] = set()

    def report(self, experiment: str, operation: Operation) -> None:
        """Carry one operation out.

        Raises:
            Away: it can't be done now.
            Refused: it can never be done.
        """
        for pause in (*DOUBTS, None):
            try:
                return self._carry_out(experiment, operation)
            except (Refused, Gone):
                raise
            except Exception as error:
                # MLflow lets errors of its database and its network through as they are.
                message = self._message(error)
                if is_ours(error):
                    raise Refused(f"a fault of llmill's own: {type(error).__name__}: {message}") from error
                if is_refusal(error):
                    self._see_experiment(experiment)
                    raise Refused(message) from error
                if not self._is_its_own(error) or not self.answers(experiment):
                    raise Away(message) from error
                if pause is None:
                    raise Refused(message) from error
                time.sleep(pause)

    def _carry_out(self, experiment: str, operation: Operation) -> None:
        if operation["op"] not in OPERATIONS:
            why = operation.get(
                "why", "there is no such operation; another version of llmill may have written it"
            )
            raise Refused(str(why))
        OPERATIONS[operation["op"]](self, experiment, operation)

    def connect(self, experiment: str) -> None:
        """See that MLflow answers and has the experiment: a new database takes seconds to make.

        Raises:
            Away: it does not answer.
        """
        try:
            self._experiment(experiment)
        except Gone:
            raise
        except Exception as error:
            raise Away(self._message(error)) from error

    def _see_experiment(self, name: str) -> None:
        """See that an experiment, by whose deletion all its runs are deleted, is still there.

        Raises:
            Gone: somebody deleted it.
            Away: it can't be asked now.
        """
        self.experiments.pop(name, None)
        self.connect(name)

    def answers(self, experiment: str) -> bool:
        """Whether MLflow answers an easy question."""
        try:
            self._client.get_experiment_by_name(experiment)
        except Exception:
            return False
        return True

    def _message(self, error: Exception) -> str:
        text = (str(error).splitlines() or [""])[0] or type(error).__name__
        return without_secrets(text, self.uri)[:300]

    def _is_its_own(self, error: Exception) -> bool:
        """Whether MLflow itself answers this to the operation, not the network or a proxy of it or of files."""
        if not isinstance(error, MlflowException) or error.error_code == "TEMPORARILY_UNAVAILABLE":
            return False
        return isinstance(error, RestException) or not self.uri.startswith("http")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes of this home from making the same tables, experiment or run at once."""
        with shared_lock(self.home / ".mlflow.lock"):
            yield

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:
            with self._alone():
                follow_home(self.home)
                self._connected = MlflowClient(self.uri)
        return self._connected

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is made where it is missing, and given our view of it."""
        if name not in self.experiments:
            client = self._client
            place = (self.home / "mlartifacts").resolve().as_uri() if target(self.home) == HOME else None
            with self._alone():
                found = client.get_experiment_by_name(name)
                if found and found.lifecycle_stage != "active":
                    raise Gone(self._restoring(name, found.experiment_id))
                tags = missing_tags(found.tags if found else {}, int(time.time() * 1000))
                if found:
                    for tag, value in tags.items():
                        client.set_experiment_tag(found.experiment_id, tag, value)
                self.experiments[name] = (
                    found.experiment_id if found else client.create_experiment(name, place, tags)
                )
        return self.experiments[name]

    def _restoring(self, name: str, experiment_id: str) -> str:
        """Describe what happened to a deleted experiment, and what a person can do."""
        place = without_user(self.uri)
        return (
            f"experiment {name} was deleted in MLflow; have it again with "
            f"`MLFLOW_TRACKING_URI={shlex.quote(place)} mlflow experiments restore --experiment-id {experiment_id}`, "
            "then `llmill sync` sends what waits"
        )

    def _run(self, experiment: str, key: str) -> str:
        """The id of a run that was begun.

        Raises:
            Refused: there is none.
        """
        run_id = self.ids.get(key) or self._find(experiment, key)
        if not run_id:
            raise Refused("its run is not in MLflow; was it, or its experiment, deleted?")
        return run_id

    def _find(self, experiment: str, key: str) -> str:
        """The id of the run with this key; empty where there is none (or it was deleted).

        There can be more when a request to create it was given up and came through all the same: the fullest is it.
        """
        runs: list[Run] = self._client.search_runs([self._experiment(experiment)], f"tags.`{KEY}` = '{key}'")
        runs.sort(key=lambda run: (len(run.data.params) + len(run.data.tags), run.info.run_id), reverse=True)
        for twin in runs[1:]:
            self._client.delete_run(twin.info.run_id)
        if runs:
            self.ids[key] = runs[0].info.run_id
        return self.ids.get(key, "") if runs else ""

    def _found_or_created(
        self, experiment: str, operation: Operation, tags: Mapping[str, str] | None = None
    ) -> tuple[str, bool]:
        """The id of a run, and whether it is new; a new one has these tags."""
        key, place = operation["run"], self._experiment(experiment)
        with self._alone():
            fresh = key in self.fresh
            self.fresh.discard(key)
            if not fresh and (run_id := self._find(experiment, key)):
                return run_id, False
            tags = {**operation["source"], **(tags or {}), KEY: key}
            if not operation.get("parent"):
                tags[COLOR] = self._next_color(place)
            try:
                created = self._client.create_run(place, operation["time"], tags, operation["name"])
            except Exception:
                self._unsure.add(key)  # the request may come through yet
                raise
        self.ids[key] = created.info.run_id
        return self.ids[key], True

    def _next_color(self, experiment_id: str) -> str:
        """A colour for a run's lines that the run before it has not."""
        runs = self._client.search_runs([experiment_id], f"tags.`{COLOR}` LIKE '#%'", max_results=1)
        return next_color(runs[0].data.tags[COLOR] if runs else None)

    def _join(self, experiment: str, operation: Operation) -> None:
        """Have a run that another process begins."""
        self._found_or_created(experiment, operation)

    def _begin(self, experiment: str, operation: Operation) -> None:
        """Begin a run, or resume it."""
        parent = operation.get("parent")
        known = {PARENT: self.ids[parent]} if parent in self.ids else {}
        run_id, new = self._found_or_created(experiment, operation, known)
        if parent and not (new and known):
            self._client.set_tag(run_id, PARENT, self._run(experiment, parent))
        if not new:
            name = operation["name"] if operation.get("rename") else None
            self._client.update_run(run_id, status="RUNNING", name=name)
        if new and operation.get("seen"):
            self._see_again(run_id, **operation["seen"])

    def _see_again(self, run_id: str, stage: str, fingerprint: str, offset: int) -> None:
        """Give a run that was deleted, and is made anew, what the old one had of a training."""
        store = Store(self.home)
        for folder in (store.path(stage, fingerprint), store.partial(stage, fingerprint)):
            lines, _ = read_lines(folder / EVENTS, 0, offset)
            points = [Metric(*point) for line in lines for point in event_points(json.loads(line))]
            self._log_entries(run_id, [], [], points)

    def _log(self, experiment: str, operation: Operation) -> None:
        links = {tag: self._id_of(experiment, link) for tag, link in operation.get("links", {}).items()}
        self._log_entries(
            self._run(experiment, operation["run"]),
            [Param(*param) for param in operation.get("params", {}).items()],
            [RunTag(*tag) for tag in {**operation.get("tags", {}), **links}.items()],
            [Metric(name, float(value), *when) for name, value, *when in operation.get("points", [])],
        )

        self._draw_scores(experiment, [name for name, *_ in operation.get("points", []) if SCORED in name])

    def _draw_scores(self, experiment: str, metrics: Sequence[str]) -> None:
        """See that the experiment's view has a chart of each of these metrics."""
        new = {(experiment, name) for name in metrics} - self.drawn
        if not new:
            return
        place = self._experiment(experiment)
        with self._alone():
            value = self._client.get_experiment(place).tags.get(TAG, "")
            drawn = value if is_older(value) else with_scores(value, [name for _, name in new])
            if drawn != value:
                self._client.set_experiment_tag(place, TAG, drawn)
        self.drawn |= new

    def _untag(self, experiment: str, operation: Operation) -> None:
        run_id = self._run(experiment, operation["run"])
        if operation["tag"] in self._client.get_run(run_id).data.tags:
            self._client.delete_tag(run_id, operation["tag"])

    def _link(self, experiment: str, operation: Operation) -> None:
        """Tag a run with the id of another one."""
        self._log(experiment, {"run": operation["run"], "links": {operation["tag"]: operation}})

    def _id_of(self, experiment: str, link: Mapping[str, str]) -> str:
        """The id that a link leads to, which may not have been known when it was logged; empty where there is none."""
        key = link["to"]
        return link["id"] or (self.ids.get(key) or self._find(experiment, key) if key else "")

    def _inputs(self, experiment: str, operation: Operation) -> None:
        inputs = [
            DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "input")])
            for dataset in operation["datasets"]
        ]
        self._client.log_inputs(self._run(experiment, operation["run"]), datasets=inputs)

    def _models(self, experiment: str, operation: Operation) -> None:
        """List on a run the models that an artifact is known as: the last one of a training, an export."""
        run_id, known = self._run(experiment, operation["run"]), f"'{operation['fingerprint']}'"
        found = self._client.search_logged_models(
            [self._experiment(experiment)], f"tags.`{FINGERPRINT}` = {known}", max_results=LISTED
        )
        of_step = {int(model.params.get("step", 0)): model.model_id for model in found}
        listed = {one.model_id for one in self._client.get_run(run_id).outputs.model_outputs}
        if of_step and of_step[max(of_step)] not in listed:
            step = max(of_step)
            self._client.log_outputs(run_id, [LoggedModelOutput(of_step[step], step)])

    def _log_entries(
        self, run_id: str, params: list[Param], tags: list[RunTag], metrics: list[Metric]
    ) -> None:
        """Send as much a request as MLflow takes; of one that is refused, what is not to blame.

        Raises:
            Refused: some entries were to blame; the message names one.
        """
        refused: list[str] = []
        parts: list[list[Param | RunTag | Metric]] = [
            [*some_params, *some_tags, *some_metrics]
            for some_params, some_tags, some_metrics in zip_longest(
                slices(params, ENTRIES), slices(tags, ENTRIES), slices(metrics, METRICS), fillvalue=()
            )
        ]
        while parts:
            part = parts.pop(0)
            try:
                self._client.log_batch(
                    run_id,
                    metrics=[entry for entry in part if isinstance(entry, Metric)],
                    params=[entry for entry in part if isinstance(entry, Param)],
                    tags=[entry for entry in part if isinstance(entry, RunTag)],
                )
            except MlflowException as error:
                if not is_refusal(error) or self._client.get_run(run_id).info.lifecycle_stage != "active":
                    raise
                if len(part) > 1:
                    parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                else:
                    refused.append(self._message(error))
        if refused:
            raise Refused(refused[0] + (f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""))

    def _text(self, experiment: str, operation: Operation) -> None:
        self._client.log_text(self._run(experiment, operation["run"]), operation["text"], operation["name"])

    def _table(self, experiment: str, operation: Operation) -> None:
        """Log columns and rows as a file that MLflow's pages show as a table, in the form of its own `log_table`."""
        run_id, name = self._run(experiment, operation["run"]), operation["name"]
        table = {"columns": operation["columns"], "data": operation["data"]}
        self._client.log_text(run_id, json.dumps(table, allow_nan=False), name)
        tables = tables_of(self._client.get_run(run_id).data.tags)
        if name not in tables:
            self._client.set_tag(run_id, TABLES, tables_tag([*tables, name]))

    def _note(self, experiment: str, operation: Operation) -> None:
        """Show Markdown on the page of a run, with links to it and to the table of all runs."""
        run_id, place = self._run(experiment, operation["run"]), self._experiment(experiment)
        where = links(
            operation["name"],
            run_url(self.uri, place, run_id),
            table_url(self.uri, place),
            store=operation["store"],
            command=operation["command"],
        )
        text = with_pages(operation["text"], run_url(self.uri, place, run_id), operation.get("pages", ()))
        self._client.set_tag(run_id, NOTE, clipped(f"{text}\n\n{where}".strip()))

    def _artifact(self, experiment: str, operation: Operation) -> None:
        """Log files of a sealed artifact; where it was removed meanwhile, a tag says so."""
        run_id = self._run(experiment, operation["run"])
        store, name = Store(self.home), (operation["stage"], operation["fingerprint"])
        self.uploading = True
        try:
            artifact = store.get(*name)
            if artifact and artifact.payload_sha256 == operation["payload_sha256"]:
                UPLOADS[operation["what"]](self._client, run_id, artifact)
                return
        except Damaged as error:
            raise Refused(str(error)) from None
        except FileNotFoundError:
            if store.get(*name):
                raise
        finally:
            self.uploading = False
        self._client.set_tag(run_id, FILES, "not all here: the artifact was removed before MLflow had them")

    def _candidate(self, experiment: str, operation: Operation) -> None:
        """Make an export's version the candidate of its registered model."""
        name, fingerprint = operation["model"], operation["fingerprint"]
        if not name_candidate(self._client, name, fingerprint, operation["newest"]):
            raise Refused(f"there is no version of models:/{name} with the export {fingerprint}")

    def _end(self, experiment: str, operation: Operation) -> None:
        key = operation["run"]
        if key in self._unsure:
            self._find(experiment, key)
        self._client.set_terminated(self._run(experiment, key), operation["status"], operation["time"])


OPERATIONS: dict[str, Callable[[Mlflow, str, Operation], None]] = {
    "join": Mlflow._join,
    "begin": Mlflow._begin,
    "params": Mlflow._log,
    "tags": Mlflow._log,
    "metrics": Mlflow._log,
    LOG: Mlflow._log,
    "untag": Mlflow._untag,
    "link": Mlflow._link,
    "inputs": Mlflow._inputs,
    "models": Mlflow._models,
    "text": Mlflow._text,
    "table": Mlflow._table,
    "note": Mlflow._note,
    "artifact": Mlflow._artifact,
    "candidate": Mlflow._candidate,
    "end": Mlflow._end,
}


def slices(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items, ``size`` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def is_refusal(error: Exception) -> bool:
    """Whether the same request will be answered so for ever."""
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in REFUSING
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    return False


def is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of llmill's: the operation is not one as we write them, or we made a mistake."""
    if isinstance(error, OSError | MlflowException | HTTPError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("flows.")
