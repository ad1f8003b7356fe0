"""The manifests: held against the schemas of Kubernetes and of the operators, and against what llmill really has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command_line import Llmill
from known_names import INFRA, ROOT, parse, unknown
from kubeflow_trainer_api import models

from flows.engine.ports import free_port
from flows.engine.services import GPU_POOL, POOL
from flows.prefect.context import IN_FLIGHT
from flows.recipe import RecipeRuntime

FOLDER = INFRA / "kubernetes"
VERSION = "1.33"
PARTS = ("base", "training", "data")
TRAINER = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}


@cache
def manifests() -> list[dict[str, Any]]:
    """All documents of all parts, without kustomize's own."""
    files = [
        path
        for path in sorted(FOLDER.rglob("*.yaml"))
        if path.name not in ("kustomization.yaml", "names.yaml")
    ]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in manifests() if document["kind"] == kind}


def kustomization(part: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / part / "kustomization.yaml").read_text())


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every specification of a pod within a document."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for child in value.values():
            yield from pods(child)
    elif isinstance(value, list):
        for child in value:
            yield from pods(child)


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods(manifests()) for container in pod["containers"]]


def check(document: dict[str, Any]) -> None:
    """Hold a document against its schema.

    Dask's operator publishes no models: of its documents, what they hold of Kubernetes is checked.
    """
    kind = document["kind"]
    if kind in TRAINER:
        model = TRAINER[kind].from_dict(document)
        assert model
        assert model.to_dict() == document  # keys that the model does not have would be gone
    elif document["apiVersion"].startswith("kubernetes.dask.org"):
        for pod in pods(document):
            check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("document", manifests(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_documents_are_what_their_schemas_say(document: dict[str, Any]) -> None:
    check(document)


@pytest.mark.parametrize("kind", ["Deployment", "TrainingRuntime", "DaskCluster"])
def test_a_misspelt_key_would_be_noticed(kind: str) -> None:
    document = yaml.safe_load(yaml.dump(next(iter(of_kind(kind).values()))))
    next(pods(document))["containers"][0]["imagee"] = "x"
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check(document)


def test_kustomize_finds_what_it_lists_and_lists_all_there_is() -> None:
    for part in PARTS:
        lists = kustomization(part)
        generated = [file for entry in lists.get("configMapGenerator", []) for file in entry.get("files", [])]
        listed = [*lists["resources"], *lists.get("configurations", []), *generated]
        assert all((FOLDER / part / name).exists() for name in listed), listed
        there = {path.name for path in (FOLDER / part).iterdir()} - {"kustomization.yaml"}
        assert there == {name for name in listed if name != "../base"}


@pytest.mark.parametrize("part", PARTS)
def test_kustomize_builds_it_and_every_name_in_it_leads_somewhere(part: str) -> None:
    kubectl = shutil.which("kubectl") or pytest.skip("kubectl is not installed here")
    built = subprocess.run(
        [kubectl, "kustomize", FOLDER / part], capture_output=True, text=True, check=True
    ).stdout
    documents = list(yaml.safe_load_all(built))
    there = {(document["kind"], document["metadata"]["name"]) for document in documents} | {
        ("Secret", "llmill")
    }
    for pod in pods(documents):
        assert named(pod) <= there, named(pod) - there


def named(pod: dict[str, Any]) -> set[tuple[str, str]]:
    """ConfigMaps, secrets and claims that a pod names."""
    found = set()
    for container in pod["containers"]:
        for source in container.get("envFrom", []):
            found |= {
                ("ConfigMap" if key == "configMapRef" else "Secret", ref["name"])
                for key, ref in source.items()
            }
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                found.add(("Secret", variable["valueFrom"]["secretKeyRef"]["name"]))
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            found.add(("ConfigMap", volume["configMap"]["name"]))
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    return found


def test_nobody_is_root_or_may_become_more_than_he_is_and_all_say_what_they_need() -> None:
    assert len(list(pods(manifests()))) >= 9
    for pod in pods(manifests()):
        allowed = pod["securityContext"]
        assert allowed["runAsNonRoot"] is True
        assert allowed["runAsUser"] > 0
        assert allowed["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]


def test_images_have_exact_versions_and_ours_are_targets_of_the_dockerfile() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {container["image"] for container in containers()}
    ours = {f"llmill/{target}:{version}" for target in ("servers", "cpu", "gpu")}
    assert images == {*ours, "postgres:17.6-bookworm"}


def test_every_command_exists() -> None:
    programs = set()
    for container in containers():
        command = container.get("args", [])
        if command[:2] == ["python", "/opt/llmill/prepare.py"]:
            assert f"def {command[2]}()" in (INFRA / "prepare.py").read_text()
        elif command:
            programs.add(parse(command))
    assert programs == {"python", "llmill", "mlflow", "dask"}
    [job] = of_kind("TrainJob").values()
    for words in (["run", "--only", "pretrain"], ["plan", "--json"]):
        parse(["llmill", *words, *job["spec"]["trainer"]["args"]])


def test_every_variable_is_read_by_something() -> None:
    names = [variable["name"] for container in containers() for variable in container.get("env", [])]
    names += [
        variable["name"] for job in of_kind("TrainJob").values() for variable in job["spec"]["trainer"]["env"]
    ]
    for part in PARTS:
        for entry in kustomization(part).get("configMapGenerator", []):
            names += [literal.partition("=")[0] for literal in entry.get("literals", [])]
    assert "LLMILL_ENDPOINT" in names
    assert not unknown(names)


def test_the_training_names_as_many_machines_and_ranks_as_it_asks_for() -> None:
    [job], [runtime] = of_kind("TrainJob").values(), of_kind("TrainingRuntime").values()
    trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
    told = {variable["name"]: variable["value"] for variable in trainer["env"]}
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert told["LLMILL_NODES"] == str(trainer["numNodes"])
    assert told["LLMILL_ENDPOINT"].startswith(f"{name}-{replicated['name']}-0-0.{name}:")
    [container] = [one for pod in pods(runtime) for one in pod["containers"]]
    gpus = int(container["resources"]["requests"]["nvidia.com/gpu"])
    assert f"--set=pretrain.runtime.ranks={gpus * trainer['numNodes']}" in trainer["args"]
    recipe = trainer["args"][0].replace("/opt/llmill/recipes", str(ROOT / "flows/recipes"))
    assert Path(recipe).exists()


def test_workers_serve_llmills_pools() -> None:
    args = {
        name: next(pods(worker))["containers"][0]["args"] for name, worker in of_kind("Deployment").items()
    }
    pools = {name: words[words.index("--pool") + 1] for name, words in args.items() if "--pool" in words}
    assert pools == {"worker-cpu": POOL, "worker-gpu": GPU_POOL}


def test_the_data_stages_find_dask_where_its_manifest_says() -> None:
    [cluster], [scaler] = of_kind("DaskCluster").values(), of_kind("DaskAutoscaler").values()
    name = cluster["metadata"]["name"]
    address = f"tcp://{name}-scheduler:{cluster['spec']['scheduler']['service']['ports'][0]['port']}"
    RecipeRuntime(task_runner="dask", address=address)
    assert address in (FOLDER / "data/dask.yaml").read_text()
    assert scaler["spec"]["cluster"] == name
    least, most = scaler["spec"]["minimum"], scaler["spec"]["maximum"]
    assert 1 <= least <= cluster["spec"]["worker"]["replicas"] <= most <= IN_FLIGHT * least


@pytest.mark.long
def test_two_machines_of_a_training_job_find_each_other(finished: Llmill, tmp_path: Path) -> None:
    """Both run node.sh, as the operator has them do it, with the home that they share."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    for stage in ("download", "clean", "dedup", "train_tokenizer", "tokenize"):
        shutil.copytree(finished.home / "store" / stage, home / "store" / stage)
    programs.mkdir()
    (programs / "llmill").write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli.main "$@"\n')
    (programs / "llmill").chmod(0o755)
    shared = {
        **finished.environment(),
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LLMILL_HOME": str(home),
        "LLMILL_NODES": "2",
        "LLMILL_ENDPOINT": f"127.0.0.1:{free_port()}",
        "OMP_NUM_THREADS": "1",
    }
    settings = ["--set=pretrain.runtime.ranks=2", "--set=pretrain.tokens=4096"]
    command = ["sh", FOLDER / "training/node.sh", finished.recipe, *settings]
    nodes = [
        subprocess.Popen(
            command, env={**shared, "JOB_COMPLETION_INDEX": str(index)}, stdout=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    said = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "2 rank(s)" in said[0]
    assert len(list(home.glob("store/pretrain/*/manifest.json"))) == 1
