"""The metrics of an exported model in MLflow's registry: how good it is, how well that is known, and on which data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from data_pipeline.core.text import table
from flows.engine.store import Artifact, Store, canonical_json
from flows.listeners.mlflow.points import METRICS

EVALUATED = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "loss", "perplexity", "documents")
"""Metrics of an evaluation that a registered model shows."""
TRAINED = ("parameters", "tokens", "epochs")
"""Metrics of a training that it shows."""
HEADLINES = {"bits_per_byte": "{:.4f}", "accuracy": "{:.1%}"}
"""Metrics that sum up how a model did on data -> how they are written."""
DIGEST = 16
"""Digits of a file's checksum that MLflow knows it by; it keeps 36 at most."""


@dataclass(frozen=True, kw_only=True)
class OnData:
    """The metrics of one model on one data set."""

    name: str
    digest: str
    place: str
    """Where the data is, as a URI."""
    metrics: Mapping[str, float]
    """Under their names in the registry: of a set or task ``NAME/METRIC``."""
    prefix: str = ""
    """``NAME/``, of a set or task."""

    @property
    def headline(self) -> str:
        """``1.2345 (1.2210 to 1.2480)``, ``46.0% (40.4% to 51.7%)``: the first of `HEADLINES` that there is."""
        for name, form in HEADLINES.items():
            found = [self.metrics.get(f"{self.prefix}{name}{end}") for end in ("", "_low", "_high")]
            if found[0] is not None:
                said = [form.format(one) for one in found if one is not None]
                return f"{said[0]} ({said[1]} to {said[2]})" if len(said) == 3 else said[0]
        return ""


@dataclass(frozen=True)
class Measured:
    """The metrics of one exported model."""

    trained: Mapping[str, float]
    evaluated: Sequence[OnData]
    """On the held-out documents, and on each set and task."""
    recipe: str

    @property
    def tags(self) -> dict[str, str]:
        """Tags of a version of a registered model, which its list can show as columns."""
        tags = {name: f"{value:,.0f}" for name, value in self.trained.items() if name != "epochs"}
        tags |= {"recipe": self.recipe}
        for one in self.evaluated:
            if not one.prefix:
                tags |= {"bits_per_byte": one.headline, "evaluated_on": one.name}
            elif one.headline:
                tags |= {one.name: one.headline}
        return tags

    @property
    def summary(self) -> str:
        """A table in Markdown."""
        rows = [(name.replace("_", " "), text) for name, text in self.tags.items()]
        return table(("", ""), rows, ["---", "---"])


def measured(artifact: Artifact) -> Measured:
    """Read how a model did from the manifests of what it was exported from."""
    store = Store(artifact.path.parents[2])
    found = {
        type_: store.get(one.stage, one.fingerprint)
        for type_, one in artifact.inputs.items()
        if type_ in ("model", "scores")
    }
    model, scores = found.get("model"), found.get("scores")
    return Measured(
        trained=chosen(model, TRAINED) | chosen(artifact, ("parameters",)),
        evaluated=[*on_data(scores, store)] if scores else [],
        recipe=artifact.manifest["recipe"],
    )


def on_data(scores: Artifact, store: Store) -> Iterator[OnData]:
    """Yield the metrics of an evaluation by the data that they were measured on."""
    if tokens := scores.inputs.get("tokens"):
        yield OnData(
            name=f"held-out documents of {scores.manifest['recipe']}",
            digest=tokens.fingerprint,
            place=store.path(tokens.stage, tokens.fingerprint).resolve().as_uri(),
            metrics=chosen(scores, EVALUATED),
        )
    config = scores.manifest["config"]
    for one in (*config.get("sets", ()), *config.get("tasks", ())):
        prefix = f"{one['name']}/"
        yield OnData(
            name=one["name"],
            digest=one["path"][:DIGEST],
            place=f"sha256:{one['path']}",
            metrics={key: value for key, value in scores.metrics.items() if key.startswith(prefix)},
            prefix=prefix,
        )


def chosen(artifact: Artifact | None, names: tuple[str, ...]) -> dict[str, float]:
    return {name: artifact.metrics[name] for name in names if name in artifact.metrics} if artifact else {}


def log_metrics(client: MlflowClient, run_id: str, artifact: Artifact, model_id: str | None = None) -> None:
    """Put a model's metrics on a run and on its logged model, those of its evaluation tied to their data sets."""
    found, stamp = measured(artifact), artifact.sealed_at
    metrics = [
        Metric(name, value, stamp, 0, model_id=model_id, run_id=run_id)
        for name, value in found.trained.items()
    ]
    datasets = []
    for one in found.evaluated:
        of_data = {"dataset_name": one.name, "dataset_digest": one.digest}
        metrics += [
            Metric(name, value, stamp, 0, model_id=model_id, run_id=run_id, **of_data)
            for name, value in one.metrics.items()
        ]
        source = canonical_json({"uri": one.place})
        size = {"documents": one.metrics.get(f"{one.prefix}documents", one.metrics.get(f"{one.prefix}items"))}
        dataset = Dataset(one.name, one.digest, "local", source, profile=json.dumps(size, allow_nan=False))
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", "eval")]))
    if datasets:
        client.log_inputs(run_id, datasets=datasets)
    for start in range(0, len(metrics), METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS])
