"""Models as MLflow sees them: what training validated, with its metrics, and exports that MLflow can load and serve.

An export becomes a version of the registered model named as the recipe, with the alias ``candidate`` where it was not
one of a sweep, which names its best when it is over. Its folder is laid out as `mlflow.transformers` does it, from the
sealed files and without loading a weight, so that ``mlflow models serve`` and ``mlflow.transformers.load_model`` take
it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, infer_signature
from mlflow.models.utils import _save_example as save_example
from mlflow.types import ColSpec, Schema

from flows.engine.store import LINKED, Artifact
from flows.engine.training import EVENTS, read_lines
from flows.listeners.markdown import code
from flows.listeners.mlflow.lineage import FINGERPRINT, WEIGHTS
from flows.listeners.mlflow.model_metrics import log_metrics, measured
from flows.listeners.mlflow.points import event_points
from flows.listeners.mlflow.registry import CANDIDATE, CHAMPION

MOST_CHECKPOINTS = 20
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
ABOUT = {"manifest.json", "report.md", "README.md"}
PROMPT, ANSWER = ["Once upon a time"], ["Once upon a time there was"]
LABELLED = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string", "label"), ColSpec("double", "score")]),
)
"""Signature of a model that gives texts labels."""
PARAMS = {"max_new_tokens": 32, "do_sample": False}
REQUIREMENTS = ("mlflow", "torch", "transformers")


def log_checkpoints(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    """Log what training validated as models, each with the validation's metrics; of many, evenly spread ones.

    The weights of the last one are sealed; of the others, as a tag says, only the metrics are left.
    """
    validations = validations_of(artifact)
    stride = max(1, -(-len(validations) // MOST_CHECKPOINTS))
    for step, points in reversed([*validations.items()][::-1][::stride]):
        last = step == max(validations)
        tags = {
            WEIGHTS: f"sealed in {artifact.path}" if last else "not kept: training continued",
            FINGERPRINT: artifact.fingerprint,
        }
        params = {"step": str(step)}
        model = logged(client, run_id, f"step-{step:06d}", "checkpoint", params, tags)
        client.log_batch(run_id, metrics=[Metric(*point, model_id=model.model_id) for point in points])
        finish(client, model)


def validations_of(artifact: Artifact) -> dict[int, list[Any]]:
    """Step -> the points of its validation. A step that was made again after a kill was validated again, alike."""
    lines, _ = read_lines(artifact.path / EVENTS, 0)
    events = [event for line in lines if (event := json.loads(line))["event"] == "validation"]
    return {event["step"]: event_points(event) for event in sorted(events, key=lambda event: event["step"])}


def register(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    """Register an export, with its files, as a version of its recipe's model."""
    new_version(client, run_id, artifact, "here")


def register_reference(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    """The same for an export that is too large to be sent: the version says where it is."""
    new_version(client, run_id, artifact, f"in {artifact.path}; larger than runtime.upload_mb")


def new_version(client: MlflowClient, run_id: str, artifact: Artifact, weights: str) -> None:
    """Make a version of an export, once."""
    name, tags = artifact.manifest["recipe"], {FINGERPRINT: artifact.fingerprint, WEIGHTS: weights}
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    if any(one.tags.get(FINGERPRINT) == artifact.fingerprint for one in versions):
        log_metrics(client, run_id, artifact)  # the model, of another run that made the same, has them
    else:
        params = {"parameters": f"{artifact.metrics['parameters']:.0f}"}
        model = logged(client, run_id, name, "export", params, tags)
        if weights == "here":
            with laid_out(artifact, model, run_id) as folder:
                client.log_model_artifacts(model.model_id, str(folder))
        log_metrics(client, run_id, artifact, model.model_id)
        finish(client, model)
        place, about = model.artifact_location, description(artifact, weights == "here")
        tags |= measured(artifact).tags
        client.create_model_version(name, place, run_id, tags, None, about, model_id=model.model_id)


def name_candidate(client: MlflowClient, name: str, fingerprint: str, newest: bool) -> bool:
    """Make the version of an export the candidate of its model; whether there is one.

    With ``newest``, a version that was made later keeps the alias: what is reported late does not take it back.
    """
    versions = client.search_model_versions(f"name = '{name}'")
    found = [int(one.version) for one in versions if one.tags.get(FINGERPRINT) == fingerprint]
    if not found:
        return False
    aliases = client.get_registered_model(name).aliases
    later = newest and int(aliases.get(CANDIDATE, 0)) > max(found)
    if not later and int(aliases.get(CHAMPION, 0)) != max(found):
        client.set_registered_model_alias(name, CANDIDATE, str(max(found)))
    return True


def description(artifact: Artifact, upload: bool) -> str:
    """Return the text of the page of a model's version, in Markdown."""
    how = (
        "`mlflow.transformers.load_model`, `mlflow models serve`"
        if upload
        else "`transformers`, from its folder"
    )
    return (
        f"Exported by llmill: {artifact.metrics['parameters']:,.0f} parameters, logits within "
        f"{artifact.metrics['logits_max_abs_difference']:.1e} of those that were trained. Load it by {how}.\n\n"
        f"{measured(artifact).summary}\n\n"
        f"Sealed in {code(str(artifact.path))}; `llmill trace {artifact.fingerprint}` shows what it was made from."
    )


def logged(
    client: MlflowClient,
    run_id: str,
    name: str,
    kind: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> LoggedModel:
    """The model of this name that a run logged, or a new one."""
    experiment = client.get_run(run_id).info.experiment_id
    wanted = f"source_run_id = '{run_id}' and name = '{name}'"
    found = client.search_logged_models([experiment], wanted)
    if found:
        return found[0]
    return client.create_logged_model(experiment, name, run_id, dict(tags), dict(params), kind)


def finish(client: MlflowClient, model: LoggedModel) -> None:
    if str(model.status) != "READY":
        client.finalize_logged_model(model.model_id, "READY")


@contextmanager
def laid_out(artifact: Artifact, model: LoggedModel, run_id: str) -> Iterator[Path]:
    """An export as a folder of MLflow's, for as long as the block lasts; weights are linked, not copied."""
    with tempfile.TemporaryDirectory(prefix=LINKED, dir=artifact.path.parents[1]) as temporary:
        folder = Path(temporary)
        for path in sorted(artifact.path.iterdir()):
            part = "components/tokenizer" if path.name in TOKENIZER else "model"
            if path.is_file() and path.name not in ABOUT and not path.name.startswith("."):
                (folder / part).mkdir(parents=True, exist_ok=True)
                link(path, folder / part / path.name)
        describe(artifact, model, run_id, folder)
        yield folder


def link(source: Path, target: Path) -> None:
    """A second name of a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def describe(artifact: Artifact, model: LoggedModel, run_id: str, folder: Path) -> None:
    """Write ``MLmodel`` and what belongs to it: signature, input example, requirements."""
    config = json.loads((artifact.path / "config.json").read_text(encoding="utf-8"))
    described = Model(run_id=run_id, model_id=model.model_id, model_uuid=model.model_id)
    architecture = config["architectures"][0]
    if architecture.endswith("ForSequenceClassification"):
        task, pipeline = "text-classification", "TextClassificationPipeline"
        described.signature = LABELLED
        save_example(described, PROMPT, str(folder))
    else:
        task, pipeline = "text-generation", "TextGenerationPipeline"
        described.signature = infer_signature(PROMPT, ANSWER, PARAMS)
        save_example(described, (PROMPT, PARAMS), str(folder))
    described.add_flavor(
        "transformers",
        transformers_version=version("transformers"),
        task=task,
        instance_type=pipeline,
        pipeline_model_type=architecture,
        source_model_name=artifact.manifest["recipe"],
        model_binary="model",
        torch_dtype=f"torch.{config['dtype']}",
        components=["tokenizer"],
        tokenizer_type="PreTrainedTokenizerFast",
    )
    pyfunc.add_to_model(described, loader_module="mlflow.transformers", python_env="python_env.yaml")
    described.save(str(folder / "MLmodel"))
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]
    (folder / "requirements.txt").write_text("\n".join(pinned) + "\n", encoding="utf-8")
    python = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(python), encoding="utf-8")
