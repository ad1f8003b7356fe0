"""``llmill compare`` on real runs: two recipes that differ in one setting that matters, and seeds of one recipe."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import AWAY, Llmill
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.compare.compare import compare
from flows.compare.page import page
from flows.compare.subjects import Finder
from flows.engine.store import Artifact, Store


@pytest.fixture(scope="module")
def llmill(swept: Llmill, tmp_path_factory: pytest.TempPathFactory) -> Llmill:
    """A home with a good recipe and a bad one, of two seeds each, which may be added to."""
    home = tmp_path_factory.mktemp("compared") / "home"
    shutil.copytree(swept.home, home)
    return replace(swept, home=home)


@pytest.fixture(scope="module")
def client(llmill: Llmill) -> MlflowClient:
    return MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client: MlflowClient) -> dict[tuple[str, str], Run]:
    """(lr, seed) -> its pipeline's run."""
    experiment = client.get_experiment_by_name("small")
    found = client.search_runs([experiment.experiment_id], "tags.`llmill.evaluate.fingerprint` LIKE '%'")
    return {(run.data.params["pretrain.lr"], run.data.params["pretrain.seed"]): run for run in found}


def compared(llmill: Llmill, *runs: Any) -> dict[str, Any]:
    names = [run if isinstance(run, str) else run.info.run_id for run in runs]
    return json.loads(llmill("compare", *names, "--json", "--no-log").stdout)


def test_of_two_recipes_the_one_that_learns_makes_the_better_model_whichever_is_named_first(llmill, runs):
    good, bad = runs["0.003", "0"], runs["1e-05", "0"]
    for first, second, outcome in ((bad, good, "second is better"), (good, bad, "first is better")):
        said = compared(llmill, first, second)
        (claim,) = said["verdict"]["models"]
        assert claim["outcome"] == outcome
        assert claim["p_value"] < 0.01
        assert not claim["low"] <= 0 <= claim["high"]
        figures = [run.data.metrics["evaluate/bits_per_byte"] for run in (first, second)]
        assert claim["difference"] == pytest.approx(figures[1] - figures[0])
        assert said["settings"] == [
            {
                "stage": "pretrain",
                "name": "lr",
                "values": [float(run.data.params["pretrain.lr"]) for run in (first, second)],
            }
        ]


def test_whether_the_setting_is_better_is_not_said_from_one_seed_each(llmill, runs):
    said = compared(llmill, runs["1e-05", "0"], runs["0.003", "0"])["verdict"]
    assert [claim["outcome"] for claim in said["recipes"]] == ["not known"]
    assert "can't be decided from one seed" in said["about_recipes"]
    assert "llmill sweep RECIPE --grid pretrain.lr=1e-05,0.003 --seeds 3" in said["about_recipes"]


def test_from_two_seeds_each_it_is_said_of_the_recipes(llmill, runs):
    order = [runs["1e-05", "0"], runs["1e-05", "1"], runs["0.003", "0"], runs["0.003", "1"]]
    said = compared(llmill, *order)["verdict"]
    (claim,) = said["recipes"]
    assert claim["outcome"] == "second is better"
    assert [group["runs"] for group in said["groups"]] == [["A", "B"], ["C", "D"]]
    assert [group["settings"] for group in said["groups"]] == [{"pretrain.lr": 1e-5}, {"pretrain.lr": 0.003}]
    mean = [sum(group["bits_per_byte"]) / 2 for group in said["groups"]]
    assert claim["difference"] == pytest.approx(mean[1] - mean[0])
    (swapped,) = compared(llmill, *order[::-1])["verdict"]["recipes"]
    assert swapped["outcome"] == "first is better"


def test_two_seeds_of_one_recipe_are_never_better(llmill, runs):
    said = compared(llmill, runs["0.003", "0"], runs["0.003", "1"])
    assert said["verdict"]["about_recipes"].startswith(
        "no difference: these are seeds of one recipe (2 models, "
    )
    assert [row["name"] for row in said["settings"]] == ["seed"]
    assert not said["verdict"]["recipes"]
    printed = llmill(
        "compare", runs["0.003", "0"].info.run_id, runs["0.003", "1"].info.run_id, "--no-log"
    ).stdout
    assert "better" not in json.dumps(said) + printed


def test_a_run_is_the_same_model_as_itself(llmill, runs):
    run = runs["0.003", "0"]
    said = compared(llmill, run, run)
    assert [claim["outcome"] for claim in said["verdict"]["models"]] == ["same model"]
    assert said["verdict"]["about_recipes"] == "no difference: they are the same model"
    assert not said["settings"]
    assert all(len(set(row["values"])) == 1 for row in said["metrics"] + said["data"])


def test_settings_that_make_equal_weights_make_the_same_model_and_nothing_is_advised(llmill, runs):
    made = runs["0.003", "0"].data.tags["llmill.evaluate.fingerprint"]
    first, second = Finder(Store(llmill.home)).find([made, made])
    training = first.artifacts["pretrain"]
    config = {**training.manifest["config"], "lr": 0.004}
    other = Artifact(training.path, {**training.manifest, "config": config, "fingerprint": "0" * 16})
    second = replace(second, artifacts={**second.artifacts, "pretrain": other})
    comparison = compare([first, second])
    said = json.loads(json.dumps(comparison.as_json(), allow_nan=False))["verdict"]
    assert [claim["outcome"] for claim in said["models"]] == ["same model"]
    assert [claim["outcome"] for claim in said["recipes"]] == ["same models"]
    assert not said["advice"]
    assert "make the same models" in said["about_recipes"]
    assert "sweep" not in said["about_recipes"]
    assert "nan" not in page(comparison)


def test_a_run_is_found_by_all_its_names(llmill, client, runs):
    run = runs["1e-05", "1"]
    tags = run.data.tags
    made = {stage: tags[f"llmill.{stage}.fingerprint"] for stage in ("pretrain", "evaluate", "export")}
    client.create_registered_model("found")
    client.create_model_version("found", "/elsewhere", tags={"llmill.fingerprint": made["export"]})
    client.set_registered_model_alias("found", "candidate", "1")
    names = [run.info.run_id, run.info.run_id[:12], run.info.run_name, *made.values(), made["evaluate"][:10]]
    names += [tags["llmill.dedup.run_id"], tags["llmill.evaluate.run_id"], "latest"]
    names += ["models:/found/1", "models:/found@candidate"]
    for one in compared(llmill, *names)["runs"]:
        if one["label"] != "H":  # dedup's own run belongs to the one that built it
            assert one["stages"]["evaluate"] == made["evaluate"], one
            assert one["stages"]["export"] == made["export"]
    older = compared(llmill, "latest~1", "latest~3")["runs"]
    first = runs["0.003", "0"].data.tags
    assert older[1]["stages"]["evaluate"] == first["llmill.evaluate.fingerprint"]


@pytest.mark.long
def test_names_that_say_too_little_or_nothing_are_refused_with_candidates(llmill, client, runs):
    run = runs["0.003", "0"]
    said = llmill("compare", "latest", "small of yesterday", code=2).stderr
    assert "no run is called small of yesterday; there are " in said
    assert run.info.run_id[:8] in said
    assert "may be any of run " in llmill("compare", "latest", "pretrain", code=2).stderr
    assert (
        "there is no latest~9; MLflow knows 4 evaluated runs"
        in llmill("compare", "latest", "latest~9", code=2).stderr
    )
    assert "name two runs at least" in llmill("compare", "latest", code=2).stderr
    assert "registered model is called" in llmill("compare", "latest", "models:/x", code=2).stderr


@pytest.mark.long
def test_models_that_saw_other_held_out_documents_are_not_ranked(llmill, runs):
    llmill.run("--set", "pretrain.lr=0.003", "--set", "evaluate.max_documents=12", "--to", "evaluate")
    said = compared(llmill, runs["0.003", "0"], "latest")
    assert "A and B were evaluated on other documents" in said["verdict"]["refused"]
    assert not said["verdict"]["models"]
    assert "better" not in said["verdict"]["about_models"]
    llmill.run("--set", "pretrain.lr=0.003", "--set", "evaluate.max_documents=5", "--to", "evaluate")
    said = compared(llmill, "latest", "latest")
    assert said["verdict"]["refused"].startswith("5 held-out documents are too few to compare, 10 are needed")


@pytest.mark.long
def test_loss_and_perplexity_of_different_tokenizers_are_not_held_against_each_other(llmill, runs):
    llmill.run("--set", "pretrain.lr=0.003", "--set", "train_tokenizer.vocab_size=600", "--to", "evaluate")
    run = runs["0.003", "0"]
    said = compared(llmill, run, "latest")
    (warning,) = said["warnings"]
    assert "A and B have different tokenizers" in warning
    kept_apart = {row["name"] for row in said["metrics"] if row.get("comparable") is False}
    assert kept_apart == {"loss", "perplexity"}
    assert [claim["outcome"] for claim in said["verdict"]["models"]], "bits per byte still tell"
    printed = llmill("compare", run.info.run_id, "latest", "--no-log", COLUMNS="200").stdout
    assert "have different tokenizers" in printed
    tables = [line for line in printed.splitlines() if line.startswith(("evaluate", "pretrain"))]
    lines = [line for line in tables if " perplexity " in line or " loss at " in line]
    assert len(lines) == 5
    assert not any("(" in line for line in lines), "no difference is computed"
    assert not compared(llmill, run, runs["1e-05", "0"])["warnings"]


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_terminal_shows_whole_lines(llmill, runs, columns):
    ids = [run.info.run_id for run in runs.values()]
    said = llmill("compare", *ids, "--no-log", COLUMNS=columns).stdout
    assert max(map(len, said.splitlines())) <= int(columns)
    for text in ("Settings that differ", "Metrics", "On the way", "Recipes", "Models   ", "bits per byte"):
        assert text in said


def test_the_comparison_is_a_run_in_mlflow_with_page_and_figures(llmill, client, runs, tmp_path):
    first, second = runs["1e-05", "0"], runs["0.003", "0"]
    place = tmp_path / "page.html"
    printed = llmill("compare", first.info.run_id, second.info.run_id, "--html", str(place)).stdout
    (logged,) = client.search_runs([first.info.experiment_id], "tags.`llmill.kind` = 'compare'")
    assert logged.info.run_id in printed
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == f"compare {first.info.run_name} vs {second.info.run_name}"
    assert logged.data.tags["llmill.compare.runs"] == f"{first.info.run_id},{second.info.run_id}"
    assert first.info.run_id in logged.data.tags["mlflow.note.content"]
    artifacts = {
        name: client.download_artifacts(logged.info.run_id, f"compare.{name}") for name in ("html", "json")
    }
    assert Path(artifacts["html"]).read_text() == place.read_text()
    assert json.loads(Path(artifacts["json"]).read_text()) == compared(llmill, first, second)
    assert "no evaluated run" not in llmill("compare", "latest", first.info.run_id, "--no-log").stdout


def test_the_page_needs_nothing_else_and_shows_every_section(llmill, runs, tmp_path):
    place = tmp_path / "page.html"
    ids = [run.info.run_id for run in runs.values()]
    llmill("compare", *ids, "--html", str(place), "--no-log")
    text = place.read_text()
    found = Elements()
    found.feed(text)
    assert found.open == []
    assert not found.loaded, "nothing is fetched from elsewhere"
    tables = ["Settings that differ", "Metrics", "Data that differs", "On the way"]
    assert found.headings == ["Runs", "On the way", *tables, "Models, by held-out documents", "Recipes"]
    assert found.counts["svg"] == 6
    assert found.counts["polyline"] == 6 * len(ids)
    assert "prefers-color-scheme: dark" in text
    said = llmill("compare", "latest", "latest", "--html", str(tmp_path / "no" / "page.html"), code=2).stderr
    assert "No such file or directory" in said


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.headings: list[str] = []
        self.counts: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        named = dict(attrs)
        if tag in ("script", "link", "img", "iframe") or "src" in named or "@import" in str(named):
            self.loaded.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_mlflow_away_leaves_the_comparison_and_a_warning(llmill, runs):
    made = [run.data.tags["llmill.evaluate.fingerprint"] for run in runs.values()]
    ended = llmill("compare", *made[:2], **AWAY)
    assert "Models   " in ended.stdout
    assert "not in MLflow yet: MLflow at http://127.0.0.1:9 does not answer" in ended.stdout
    assert "sent what 1 run(s) had left" in llmill("sync", "--here").stdout
    said = llmill("compare", "latest", made[0], code=2, **AWAY).stderr
    assert "there is no latest: MLflow at http://127.0.0.1:9 does not answer" in said


@pytest.mark.long
def test_commands_that_only_read_do_so_in_a_home_that_cannot_be_written_to_and_others_say_so(llmill, runs):
    """A person who may read a team's home; root without the power to write what nobody may stands for him here."""
    program = shutil.which("setpriv") or pytest.skip("util-linux is not installed here")
    unable = [program, "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []

    def type_in(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*unable, sys.executable, "-m", "flows.cli.main", *words]
        return subprocess.run(
            command, env=llmill.environment(), capture_output=True, text=True, timeout=900, check=False
        )

    model = next(iter(llmill.home.glob("store/export/*/manifest.json"))).parent.name
    names = [run.info.run_id for run in list(runs.values())[:2]]
    before = modes(llmill.home)
    for path, mode in before.items():
        path.chmod(mode & ~0o222)
    try:
        kept = sorted(str(path) for path in llmill.home.rglob("*"))
        for words in (
            ("status",), ("runs",), ("plan", str(llmill.recipe)), ("verify", model), ("trace", model),
            ("find", "words that are nowhere"), ("compare", *names),
            ("generate", "--model", model, "--prompt", "def", "--max-tokens", "2"),
        ):  # fmt: skip
            said = type_in(*words)
            assert said.returncode == 0, said
            assert "Error" not in said.stdout + said.stderr, said
        for words in (("gc",), ("sync",), ("run", str(llmill.recipe)), ("up",)):
            said = type_in(*words)
            assert (said.returncode, said.stderr.count("\n")) == (2, 1), said
            assert "can't be written to" in said.stderr
        assert sorted(str(path) for path in llmill.home.rglob("*")) == kept
    finally:
        for path, mode in before.items():
            path.chmod(mode)


def modes(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mode & 0o7777 for path in (folder, *folder.rglob("*")) if not path.is_symlink()
    }


@pytest.mark.long
def test_a_run_ends_with_its_model_beside_the_one_before(llmill: Llmill, client: MlflowClient) -> None:
    llmill.run("--set", "pretrain.lr=0.0001", "--name", "by [hand]")
    before, this = Store(llmill.home).artifacts("evaluate")[-2:]
    [claim] = compared(llmill, before.fingerprint, this.fingerprint)["verdict"]["models"]
    assert this.manifest["run"] == "by [hand]"

    printed = llmill.run("--set", "pretrain.lr=0.0002").stdout
    this, newest = Store(llmill.home).artifacts("evaluate")[-2:]
    [claim] = compared(llmill, this.fingerprint, newest.fingerprint)["verdict"]["models"]
    verdict = f"evaluate: against “by [hand]”: {OUTCOMES[claim['outcome']]}: this run − the run before = "
    assert f"{verdict}{claim['difference']:+.4f} bits per byte" in printed

    experiment = client.get_experiment_by_name("small")
    [run] = client.search_runs(
        [experiment.experiment_id], f"tags.`llmill.evaluate.fingerprint` = '{newest.fingerprint}'"
    )
    note = run.data.tags["mlflow.note.content"]
    assert f"{claim['difference']:+.4f} bits per byte".replace("+", "\\+") in note
    assert "`compare.html`" in note
    html = Path(client.download_artifacts(run.info.run_id, "compare.html")).read_text()
    assert "the run before “by [hand]” vs this run “lr=0.0002" in html

    again = llmill.run("--set", "pretrain.lr=0.0002").stdout
    assert "against" not in again, "what is reused was compared by the run that made it"


OUTCOMES = {
    "second is better": "this run is better than the run before",
    "first is better": "the run before is better than this run",
    "no difference shown": "no difference shown between the run before and this run",
}


@pytest.mark.long
def test_models_of_different_corpora_are_compared_on_the_sets_and_tasks_of_both(
    llmill: Llmill, client: MlflowClient, runs: dict[tuple[str, str], Run], tmp_path: Path
) -> None:
    texts = json.loads((Path(__file__).parent / "ordinary_texts.json").read_text("utf-8")).values()
    novels, quiz = tmp_path / "novels.jsonl", tmp_path / "quiz.jsonl"
    modules = [path.read_text("utf-8")[:1500] for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    questions = [
        {"query": line.strip(), "choices": ["return self", "नमस्ते 世界"], "gold": 0}
        for line in "\n".join(modules).splitlines()
        if line.strip()
    ][:60]
    for path, rows in ((novels, [{"text": text} for text in [*texts, *modules]]), (quiz, questions)):
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        path.write_text("".join(lines), "utf-8")
    scored = [
        *("--set", f"evaluate.sets=[{{name: novels, path: {novels}}}]"),
        *("--set", f"evaluate.tasks=[{{name: quiz, path: {quiz}, kind: choice}}]"),
    ]
    llmill.run("--set", "pretrain.lr=0.003", *scored, "--only", "evaluate")
    other_split = ("--set", "pretrain.lr=0.00001", "--set", "tokenize.seed=5")
    llmill.run(*other_split, *scored)
    good, bad = (one.fingerprint for one in Store(llmill.home).artifacts("evaluate")[-2:])
    registered_with_scores(
        client, Store(llmill.home).artifacts("export")[-1], {"novels": novels, "quiz": quiz}
    )

    verdict = compared(llmill, bad, good)["verdict"]
    assert "were evaluated on other documents" in verdict["refused"]
    assert verdict["about_models"].startswith(
        "held-out documents are not compared: A and B were evaluated on"
    )
    found = {(one["name"], one["metric"]): one for one in verdict["sets_and_tasks"]}
    assert list(found) == [("novels", "bits_per_byte"), ("quiz", "accuracy"), ("quiz", "gold_bits_per_byte")]
    for key in (("novels", "bits_per_byte"), ("quiz", "gold_bits_per_byte")):
        assert found[key]["outcome"] == "second is better"
        first, second = (one["value"] for one in found[key]["values"])
        assert found[key]["difference"] == pytest.approx(second - first)
    least = ("--least", "9", "--least-accuracy", "0.5", "--no-log")
    assert (
        "B is better than A, by less than matters"
        in llmill("compare", bad, good, *least, COLUMNS="200").stdout
    )
    assert "finite" in llmill("compare", bad, good, "--least", "inf", code=2).stderr

    budget_is_paid_by_looks(llmill, (bad, good), (runs["1e-05", "0"], runs["0.003", "0"]))

    before = runs["1e-05", "0"].data.tags["llmill.evaluate.fingerprint"]
    said = compared(llmill, before, bad)["verdict"]
    assert [one["why"] for one in said["sets_and_tasks"]] == ["only B was scored on it"] * 2
    assert "llmill compare RUN RUN --sets FILE --tasks FILE" in said["about_models"]


def budget_is_paid_by_looks(llmill: Llmill, pair: tuple[str, str], others: tuple[Run, Run]) -> None:
    """The same comparison is one look, another is a stricter one, and a budget is not changed between looks."""
    bad, good = pair
    alone = compared(llmill, bad, good)
    first, again = (compared(llmill, bad, good, "--budget", "0.1") for _ in range(2))
    assert first == again
    assert first["budget"].startswith(
        "look 1 of a home that allows 0.1 of what is found to be false (the first)"
    )
    second = compared(llmill, good, bad, "--budget", "0.1")
    assert second["budget"] == first["budget"], "whichever is named first"
    for free, paid in zip(*(one["verdict"]["sets_and_tasks"] for one in (alone, first)), strict=True):
        assert paid["adjusted_p_value"] > free["adjusted_p_value"]
    assert alone["budget"] == ""
    other = compared(llmill, *others, "--budget", "0.1")["budget"]
    assert other.startswith("look 2 ")
    assert "(1 of the looks before it found something)" in other
    shown = llmill("compare", bad, good, "--budget", "0.1", "--no-log", COLUMNS="200").stdout
    assert "Budget" in shown
    record = llmill.home / "findings.json"
    assert len(json.loads(record.read_text())["looks"]) == 2
    said = llmill("compare", bad, good, "--budget", "0.2", code=2).stderr
    assert "has a budget of 0.1, of which 2 looks are paid" in said
    assert "between 0 and 1" in llmill("compare", bad, good, "--budget", "1", code=2).stderr
    record.write_text("{")
    assert "can't be read, so no budget" in llmill("compare", bad, good, "--budget", "0.1", code=2).stderr
    record.unlink()


def registered_with_scores(client: MlflowClient, export: Artifact, files: dict[str, Path]) -> None:
    """See an exported model's scores on sets and tasks in the registry, tied to the files that they are of."""
    known = f"llmill.fingerprint` = '{export.fingerprint}'"
    (version,) = client.search_model_versions(f"tags.`{known}")
    (model,) = client.search_logged_models(
        [client.get_experiment_by_name("small").experiment_id], f"tags.`{known}"
    )
    logged = {metric.key: metric for metric in model.metrics}
    [scores] = [
        one
        for one in Store(export.path.parents[2]).artifacts("evaluate")
        if one.fingerprint == export.inputs["scores"].fingerprint
    ]
    for name, metric in (("novels", "bits_per_byte"), ("quiz", "accuracy"), ("quiz", "gold_bits_per_byte")):
        found = logged[f"{name}/{metric}"]
        assert found.value == scores.metrics[f"{name}/{metric}"]
        assert found.dataset_name == name
        assert hashlib.sha256(files[name].read_bytes()).hexdigest().startswith(found.dataset_digest)
    low, high = (scores.metrics[f"quiz/accuracy_{end}"] for end in ("low", "high"))
    assert version.tags["quiz"] == f"{scores.metrics['quiz/accuracy']:.1%} ({low:.1%} to {high:.1%})"
    assert version.tags["novels"] in version.description
