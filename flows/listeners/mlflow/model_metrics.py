"""The metrics of an exported model in MLflow's registry: how good it is, how well that is known, and on which data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from data_pipeline.core.text import table
from flows.engine.store import Artifact, Store, canonical_json

EVALUATED = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "loss", "perplexity", "documents")
"""Metrics of an evaluation that a registered model shows."""
TRAINED = ("parameters", "tokens", "epochs")
"""Metrics of a training that it shows."""


@dataclass(frozen=True)
class Measured:
    """The metrics of one exported model."""

    trained: Mapping[str, float]
    evaluated: Mapping[str, float]
    data: str
    """Name of the data set that it was evaluated on; empty where it was not."""
    digest: str
    place: str
    """Where that is, as a URI."""
    recipe: str

    @property
    def bits_per_byte(self) -> str:
        """``1.2345 (1.2210 to 1.2480)``; empty where it was not evaluated."""
        if "bits_per_byte" not in self.evaluated:
            return ""
        said = f"{self.evaluated['bits_per_byte']:.4f}"
        ends = [self.evaluated.get(f"bits_per_byte_{end}") for end in ("low", "high")]
        return f"{said} ({ends[0]:.4f} to {ends[1]:.4f})" if None not in ends else said

    @property
    def tags(self) -> dict[str, str]:
        """Tags of a version of a registered model, which its list can show as columns."""
        tags = {name: f"{value:,.0f}" for name, value in self.trained.items() if name != "epochs"}
        tags |= {"recipe": self.recipe}
        return tags | ({"bits_per_byte": self.bits_per_byte, "evaluated_on": self.data} if self.data else {})

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
    tokens = scores.inputs.get("tokens") if scores else None
    data = f"held-out documents of {scores.manifest['recipe']}" if scores and tokens else ""
    return Measured(
        trained=chosen(model, TRAINED) | chosen(artifact, ("parameters",)),
        evaluated=chosen(scores, EVALUATED),
        data=data,
        digest=tokens.fingerprint if tokens else "",
        place=store.path(tokens.stage, tokens.fingerprint).resolve().as_uri() if tokens else "",
        recipe=artifact.manifest["recipe"],
    )


def chosen(artifact: Artifact | None, names: tuple[str, ...]) -> dict[str, float]:
    return {name: artifact.metrics[name] for name in names if name in artifact.metrics} if artifact else {}


def log_metrics(client: MlflowClient, run_id: str, artifact: Artifact, model_id: str | None = None) -> None:
    """Put a model's metrics on a run and on its logged model, those of its evaluation tied to their data set."""
    found, stamp = measured(artifact), artifact.sealed_at
    of_data = {"dataset_name": found.data, "dataset_digest": found.digest} if found.data else {}
    metrics = [
        Metric(name, value, stamp, 0, model_id=model_id, run_id=run_id)
        for name, value in found.trained.items()
    ]
    metrics += [
        Metric(name, value, stamp, 0, model_id=model_id, run_id=run_id, **of_data)
        for name, value in found.evaluated.items()
    ]
    if found.data:
        source = canonical_json({"uri": found.place})
        profile = json.dumps({"documents": found.evaluated.get("documents")}, allow_nan=False)
        dataset = Dataset(found.data, found.digest, "local", source, profile=profile)
        client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "eval")])])
    client.log_batch(run_id, metrics=metrics)
