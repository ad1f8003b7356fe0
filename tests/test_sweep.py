"""``llmill sweep``: settings times seeds, killed in the middle and continued, as one parent in MLflow."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import Llmill
from mlflow import MlflowClient
from mlflow.entities import Run

from data_pipeline.core.errors import UserError
from flows.compare.claims import FIRST, NONE, Claim
from flows.compare.fixed_recipes import Ranking
from flows.compare.groups import Group
from flows.compare.members import read_grid, read_members
from flows.compare.sweep import best_of, foresee
from flows.compare.verdict import Verdict
from flows.engine.store import Store

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def client(swept: Llmill) -> MlflowClient:
    return MlflowClient(f"sqlite:///{swept.home}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("small")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


@pytest.fixture(scope="module")
def parent(runs: list[Run]) -> Run:
    """The sweep's own run, of which there is one although it was started twice."""
    (found,) = [run for run in runs if run.data.tags.get("llmill.kind") == "sweep"]
    return found


@pytest.fixture(scope="module")
def groups(runs: list[Run], parent: Run) -> list[Run]:
    """The runs that sum up the seeds of a setting."""
    found = [run for run in runs if run.data.tags.get("llmill.kind") == "seeds"]
    assert {run.data.tags[PARENT] for run in found} == {parent.info.run_id}
    return sorted(found, key=lambda run: run.info.run_name, reverse=True)


@pytest.fixture(scope="module")
def members(runs: list[Run], groups: list[Run]) -> list[Run]:
    own = {group.info.run_id for group in groups}
    return [run for run in runs if run.data.tags.get(PARENT) in own]


def test_the_runs_share_the_data_and_differ_in_what_was_asked_for(swept, members):
    made = Counter(artifact.stage for artifact in Store(swept.home).artifacts())
    shared = dict.fromkeys(("download", "clean", "dedup", "train_tokenizer", "tokenize"), 1)
    assert made == {**shared, "pretrain": 4, "evaluate": 4, "export": 4}
    settings = [(run.data.params["pretrain.lr"], run.data.params["pretrain.seed"]) for run in members]
    assert settings == [("0.003", "0"), ("0.003", "1"), ("1e-05", "0"), ("1e-05", "1")]
    assert {run.info.status for run in members} == {"FINISHED"}
    reused = [run.data.tags["llmill.tokenize.how"] for run in members]
    assert reused == ["ran", "reused", "reused", "reused"]


def test_a_killed_sweep_goes_on_with_the_run_that_was_at_work_and_repeats_none(runs, parent, members):
    assert parent.info.status == "FINISHED"
    top = [run for run in runs if PARENT not in run.data.tags]
    assert top == [parent], "nothing stands beside the sweep"
    trainings = [run for run in runs if run.data.tags.get("llmill.stage") == "pretrain"]
    assert [run.data.tags[PARENT] for run in trainings] == [run.info.run_id for run in members]


def test_the_sweep_draws_its_members_scores_once_each_though_it_was_killed(client, parent, members):
    scores = [run.data.metrics["evaluate/bits_per_byte"] for run in members]
    drawn = client.get_metric_history(parent.info.run_id, "sweep/bits_per_byte")
    assert [(point.step, point.value) for point in drawn] == list(enumerate(scores, 1))
    least = client.get_metric_history(parent.info.run_id, "sweep/least_bits_per_byte")
    assert [point.value for point in least] == [min(scores[:number]) for number in range(1, 5)]
    first, *_ = parent.data.tags["mlflow.note.content"].splitlines()
    assert first.startswith("candidate: lr 0.003, seed ")
    assert (
        f"least so far: {min(scores):.4f} bits per byte, lr 0.003" in parent.data.tags["mlflow.note.content"]
    )


def test_the_seeds_of_a_setting_are_summed_up_in_a_run(groups, members):
    assert [(run.info.run_name, run.info.status) for run in groups] == [
        ("lr 0.003, 2 seeds", "FINISHED"), ("lr 0.00001, 2 seeds", "FINISHED"),
    ]  # fmt: skip
    for group in groups:
        own = [run for run in members if run.data.tags[PARENT] == group.info.run_id]
        assert {run.data.params["pretrain.lr"] for run in own} == {group.data.params["pretrain.lr"]}
        scores = [run.data.metrics["evaluate/bits_per_byte"] for run in own]
        expected = {
            "seeds/n": 2, "seeds/mean": np.mean(scores), "seeds/sd": np.std(scores, ddof=1),
            "evaluate/bits_per_byte": np.mean(scores),
        }  # fmt: skip
        assert group.data.metrics == pytest.approx(expected)
        assert (
            f"{np.mean(scores):.4f} bits per byte, standard deviation"
            in group.data.tags["mlflow.note.content"]
        )


def test_it_says_first_what_will_run_and_at_last_what_came_out(swept, parent, client):
    said = (swept.home / "sweep.txt").read_text()
    head, _, rest = said.partition("1 of 4  ·  lr 0.003, seed 0")
    assert "4 runs of 32 steps, of which 9 are built and 23 shared or sealed" in head
    assert [line.split()[-3:] for line in head.splitlines() if line.lstrip().startswith("2 ")] == [
        ["pretrain,", "evaluate,", "export"]
    ]
    assert "it ended well before this sweep was stopped" in rest
    assert "recipe 1 (lr 0.003) is better than recipe 2 (lr 1e-05)" in " ".join(rest.split())
    path = client.download_artifacts(parent.info.run_id, "compare.json")
    with open(path) as file:
        kept = json.load(file)
    assert [run["name"] for run in kept["runs"]][:2] == ["lr 0.003, seed 0", "lr 0.003, seed 1"]
    assert [claim["outcome"] for claim in kept["verdict"]["recipes"]] == ["first is better"]
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} == {
        "compare.html",
        "compare.json",
    }


def test_the_candidate_is_the_best_of_the_sweep_and_not_its_last(swept, client):
    version = client.get_model_version_by_alias("small", "candidate")
    versions = client.search_model_versions("name = 'small'")
    assert len(versions) == 4
    made_by = {}
    for export in Store(swept.home).artifacts("export"):
        pretrain = Store(swept.home).get("pretrain", export.inputs["model"].fingerprint)
        evaluate = Store(swept.home).get("evaluate", export.inputs["scores"].fingerprint)
        made_by[export.fingerprint] = (evaluate.metrics["bits_per_byte"], pretrain.manifest["config"]["lr"])
    best = min(made_by, key=lambda fingerprint: made_by[fingerprint][0])
    assert made_by[best][1] == 0.003
    assert version.tags["llmill.fingerprint"] == best
    assert int(version.version) < max(int(one.version) for one in versions)
    said = " ".join((swept.home / "sweep.txt").read_text().split())
    assert "candidate: lr 0.003, seed" in said
    assert "its recipe is shown to be better than every other" in said


def test_a_run_that_fails_leaves_the_others_going_and_says_so_at_the_end(swept, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(swept.home, home)
    llmill = replace(swept, home=home)
    grid = ("--grid", "clean.min_chars=9000000,1", "--set", "pretrain.lr=0.003")
    ended = llmill("sweep", str(llmill.recipe), *grid, "--seeds", "2", code=1)
    assert "clean dropped every document" in ended.stdout
    assert "2 of 4 runs failed; the same command runs them again" in ended.stderr
    assert "no difference: these are seeds of one recipe" in " ".join(ended.stdout.split())
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("small").experiment_id
    newest, _ = client.search_runs([experiment], "tags.`llmill.kind` = 'sweep'")
    assert newest.info.status == "FAILED"
    assert "min_chars" in newest.info.run_name


def test_too_few_held_out_documents_end_a_sweep_before_it_trains(swept, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(swept.home, home)
    llmill = replace(swept, home=home)
    before = Counter(path.parent.name for path in home.glob("store/*/*/"))
    grid = ("--grid", "pretrain.lr=0.003,0.001", "--set", "tokenize.val_fraction=0.02")
    for _ in range(2):  # the token shards are not there yet, and then they are sealed
        ended = llmill("sweep", str(llmill.recipe), *grid, code=2)
        assert "held-out documents are too few to compare models by, 10 are needed" in ended.stderr
    made = Counter(path.parent.name for path in home.glob("store/*/*/")) - before
    assert set(made) == {"tokenize"}


def planned(tmp_path, grid, seeds=1, *changes):
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: small\ndownload: {{sources: [{{name: a, kind: local, path: {tmp_path / 'a.txt'}}}]}}\n"
        "pretrain: {tokens: 1024, batch_tokens: 1024, precision: fp32}\n"
    )
    return foresee(read_members(path, changes, read_grid(grid), seeds, Store(tmp_path / "home")))


def test_what_the_comparison_will_not_be_able_to_say_is_said_before_it_runs(tmp_path):
    (one_seed,) = planned(tmp_path, ["pretrain.lr=1e-3,1e-4"])
    assert "not which setting; --seeds 3 would show it" in one_seed
    assert planned(tmp_path, ["pretrain.lr=1e-3,1e-4"], 2) == []
    assert planned(tmp_path, ["pretrain.seed=1,2"]) == []
    same, _ = planned(tmp_path, ["pretrain.lr=1e-3,0.001"])
    assert same == "lr 1e-3, seed 0 and lr 0.001, seed 0 make the same model"
    (held_out,) = planned(tmp_path, ["clean.min_chars=1,2"], 2)
    assert "which documents are held out" in held_out
    text = tmp_path / "novels.txt"
    text.write_text("Once upon a time.")
    fixed = f'evaluate.sets=[{{"name": "novels", "path": "{text}"}}]'
    assert planned(tmp_path, ["clean.min_chars=1,2"], 2, fixed) == [
        held_out.split(":")[0] + ": novels decides"
    ]
    assert planned(tmp_path, ["pretrain.lr=1e-3,1e-4"], 2, fixed, "evaluate.max_documents=9") == []
    with pytest.raises(UserError, match="max_documents is 9, and 10 are needed"):
        planned(tmp_path, ["evaluate.max_documents=100,9"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--grid", "pretrain.lr"), "write it as step.field=value,value"),
        (("--grid", "pretrain.lr=1e-3,"), "write it as step.field=value,value"),
        (("--grid", "pretrain.lr=1e-3,1e-3"), "is there twice"),
        (("--grid", "pretrain.lr=1e-3"), "a sweep is of two runs at least"),
        (("--grid", "pretrain.seed=1,2", "--seeds", "2"), "excludes --seeds"),
        (("--grid", "pretrain.lr=1e-3,fast"), "pretrain.lr"),
        (
            ("--grid", "pretrain.lr=1e-3,1e-4", "--set", "evaluate.max_documents=5"),
            "evaluate.max_documents is 5, and 10 are needed",
        ),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(swept, options, said):
    before = sorted(swept.home.glob("runs/*"))
    assert said in swept("sweep", str(swept.recipe), *options, code=2).stderr
    assert sorted(swept.home.glob("runs/*")) == before


def test_values_may_be_lists():
    assert read_grid(["pretrain.betas=[0.9, 0.95],[0.9,0.99]", "pretrain.lr=1,2"]) == {
        "pretrain.betas": ["[0.9, 0.95]", "[0.9,0.99]"],
        "pretrain.lr": ["1", "2"],
    }
    with pytest.raises(UserError, match="there twice"):
        read_grid(["pretrain.lr=1", "pretrain.lr=2"])


def test_the_best_is_of_the_recipe_with_the_least_mean_and_what_the_test_shows_is_said() -> None:
    members = [SimpleNamespace(name=f"member {place}") for place in range(4)]
    groups = [
        Group(
            label="1",
            settings={"lr": 1},
            runs=["A", "B"],
            called="a",
            models=[0, 1],
            bits_per_byte=[2.0, 1.8],
        ),
        Group(
            label="2",
            settings={"lr": 2},
            runs=["C", "D"],
            called="c",
            models=[2, 3],
            bits_per_byte=[1.7, 3.0],
        ),
    ]
    ranking = Ranking("held-out documents", [2.0, 1.8, 1.7, 3.0])
    one, two = (group.name for group in groups)
    for outcome, said in (
        (FIRST, "shown to be better than every other"),
        (NONE, f"not shown to be better than {two}"),
    ):
        best, why = best_of(
            Verdict(
                scores=SimpleNamespace(), ranking=ranking, groups=groups, recipes=[Claim(one, two, outcome)]
            ),
            members,
        )
        assert best is members[1]
        assert "1.8000 bits per byte" in why
        assert said in why
    best, why = best_of(Verdict(refused="7 held-out documents are too few"), members)
    assert best is None
    assert "no candidate is named" in why
