"""MLflow's own pages in a browser: the first click, the view that llmill's links open, its charts and its columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SECONDS, open_browser
from mlflow import MlflowClient
from mlflow_server import Server
from playwright.sync_api import Locator, Page, expect

from flows.listeners.mlflow.links import OWN_PAGES, run_url, table_url
from flows.listeners.mlflow.operations import Mlflow
from flows.listeners.mlflow.points import Point, curve_points
from flows.listeners.mlflow.reader import PipelineRuns
from flows.listeners.mlflow.samples import COLUMNS, SAMPLES
from flows.listeners.mlflow.translate import Operation, beginning, description, measured
from flows.listeners.mlflow.view import OTHER_TAGS, SCORES, SPEED, TAG, VERSION

RECIPE = "small"
BEGAN = 1_700_000_000_000
RUNS = {"lr=1e-3 · 10:36": (1.75, 1e-3), "lr=3e-3 · 10:48": (1.5, 3e-3)}
"""Name -> bits per byte and rate; the second is the better one."""
STEPS, BATCH_TOKENS = 40, 4096
SCORED = ("novels/bits_per_byte", "arc_easy/gold_bits_per_byte", "arc_easy/accuracy")
WRITTEN = "<b>日本</b>\nكتب & \ufffd"
expect.set_options(timeout=SECONDS * 1000)

TWO_LINES = (
    "card => new Set([...card.querySelectorAll('path.js-line')].map(line => line.style.stroke)).size === 2"
)
"""Whether lines of two colours are drawn in a chart."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"), *OWN_PAGES)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def experiment(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of a recipe's experiment, with two runs as a pipeline reports them."""
    mlflow = Mlflow(tmp_path_factory.mktemp("home"), server.url)
    for number, name in enumerate(RUNS):
        for operation in reported(f"{number:016x}", name, BEGAN + number * 1_000_000):
            mlflow.report(RECIPE, operation)
    return mlflow.experiments[RECIPE]


def reported(key: str, name: str, began: int) -> Iterator[Operation]:
    """The operations of a run with a training in it."""
    bits, lr = RUNS[name]
    params = {"pretrain": {"lr": lr, "tokens": STEPS * BATCH_TOKENS, "batch_tokens": BATCH_TOKENS, "seed": 1}}
    step = f"{key[:-1]}{int(key[-1], 16) + 8:x}"
    note = {"mlflow.note.content": f"{bits} bits per byte"}
    yield {"op": "begin", **beginning(key, name, began)}
    yield from description(key, params, {"llmill.recipe": RECIPE, **note})
    yield {"op": "begin", **beginning(step, "pretrain", began), "parent": key}
    yield from description(step, params["pretrain"], {"llmill.stage": "pretrain"})
    for run in (key, step):
        rows = [
            [number, number * BATCH_TOKENS, prompt, WRITTEN]
            for number in range(1, STEPS + 1)
            for prompt in "ab"
        ]
        yield {"op": "table", "run": run, "name": SAMPLES, "columns": list(COLUMNS), "data": rows}
    yield measured(key, [point for number in range(1, STEPS + 1) for point in points(bits, number, began)])
    scores = [scored(bits, number, began) for number in range(5, STEPS + 1, 5)]
    yield measured(key, [point for event in scores for point in curve_points("pretrain", event)])
    ended = began + (STEPS + 1) * 500
    headline = {
        "evaluate/bits_per_byte": bits,
        "pretrain/loss": 2 * bits,
        "tokenize/train_tokens": 5e5,
        "seconds": 61.5,
    }
    yield measured(
        key, [(metric, value, ended, 0) for metric, value in (headline | {"clean/documents": 476.0}).items()]
    )
    yield from ({"op": "end", "run": one, "status": "FINISHED", "time": ended} for one in (step, key))


def scored(bits: float, step: int, began: int) -> dict[str, Any]:
    """The event of scores after one step of a training."""
    values = (bits + 2 / step, bits + 3 / step, 0.4 - bits / 10 - 0.2 / step)
    about = {"event": "scores", "step": step, "tokens": step * BATCH_TOKENS, "time": began / 1000 + step / 2}
    return {**about, **dict(zip(SCORED, values, strict=True)), "seconds": 0.5}


def points(bits: float, step: int, began: int) -> Iterator[Point]:
    """The points of one step of a training, over steps and over tokens."""
    loss, when = 2 * bits + 3 / step, began + step * 500
    yield from (
        (name, value, when, step)
        for name, value in {
            "train/loss": loss,
            "val/bits_per_byte": loss / 2,
            "train/tokens_per_second": 9000.0 + step,
            "system/cpu_utilization_percentage": 90.0,
            "system/system_memory_usage_megabytes": 3000.0,
        }.items()
    )
    yield from (
        (f"tokens/{name}", value, when, step * BATCH_TOKENS)
        for name, value in {"train_loss": loss, "val_bits_per_byte": loss / 2}.items()
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        page.set_viewport_size({"width": 1600, "height": 1000})
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A page of a browser that has never seen MLflow, and asks nobody outside of this machine."""
    assert browser.context.browser
    context = browser.context.browser.new_context(viewport=browser.viewport_size)
    context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    context.close()
    assert faults == []


def card(page: Page, metric: str) -> Locator:
    """The chart of a metric."""
    return page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=metric)


def rows(page: Page) -> Locator:
    """The runs that are listed, in their order."""
    return page.get_by_role("row").filter(has=page.get_by_test_id("experiment-view-table-run-color"))


def test_the_view_shows_which_run_is_best_what_was_different_and_how_the_loss_went(
    page: Page, server: Server, experiment: str
):
    page.goto(table_url(server.url, experiment))
    worse, better = RUNS
    expect(rows(page)).to_have_count(2)
    expect(rows(page).nth(0)).to_contain_text(better)
    expect(card(page, "evaluate/bits_per_byte").locator(".bars .point")).to_have_count(2)
    for metric in ("tokens/train_loss", "tokens/val_bits_per_byte"):
        expect(card(page, metric)).to_contain_text(f"{better} ({metric})")
        expect(card(page, metric)).to_contain_text(f"{worse} ({metric})")
        page.wait_for_function(TWO_LINES, arg=card(page, metric).element_handle())
    expect(card(page, "pretrain.lr")).to_contain_text("0.003")
    expect(card(page, "pretrain.lr")).to_contain_text("0.001")
    expect(page.get_by_text("pretrain.seed")).to_have_count(0)
    colors = page.get_by_test_id("experiment-view-table-run-color").locator("input")
    assert colors.nth(0).input_value() != colors.nth(1).input_value()


def test_scores_while_training_are_two_lines_of_two_runs_in_one_chart_each(
    page: Page, server: Server, experiment: str
):
    page.goto(table_url(server.url, experiment))
    page.get_by_text(SCORES).scroll_into_view_if_needed()
    for metric in (f"tokens/scores/{name}" for name in SCORED):
        expect(card(page, metric)).to_have_count(1)
        card(page, metric).scroll_into_view_if_needed()
        for name in RUNS:
            expect(card(page, metric)).to_contain_text(f"{name} ({metric})")
        page.wait_for_function(TWO_LINES, arg=card(page, metric).element_handle())


def test_scores_have_no_charts_where_there_are_none_and_are_drawn_once(server: Server, tmp_path: Path):
    mlflow, key = Mlflow(tmp_path, server.url), "f" * 16
    mlflow.report("unscored", {"op": "begin", **beginning(key, "a run", BEGAN)})
    mlflow.report("unscored", measured(key, list(points(1.5, 1, BEGAN))))
    place = mlflow.experiments["unscored"]

    def view() -> str:
        return str(server.client.get_experiment(place).tags[TAG])

    assert SCORES not in view()
    curves = measured(key, curve_points("pretrain", scored(1.5, 1, BEGAN)))
    mlflow.report("unscored", curves)
    once = view()
    assert all(once.count(f"LINEtokens/scores/{name}") == 1 for name in SCORED)
    for sender in (mlflow, Mlflow(tmp_path, server.url)):
        sender.report("unscored", curves)
        assert view() == once


def test_the_machine_is_shown_below_and_charts_without_figures_are_not(
    page: Page, server: Server, experiment: str
):
    page.goto(table_url(server.url, experiment))
    page.get_by_text(SPEED).scroll_into_view_if_needed()
    for metric in ("train/tokens_per_second", "system/cpu_utilization_percentage"):
        card(page, metric).scroll_into_view_if_needed()
        page.wait_for_function(TWO_LINES, arg=card(page, metric).element_handle())
    expect(card(page, "system/gpu_0_utilization_percentage")).to_have_count(0)
    expect(card(page, "clean/documents")).to_have_count(0)


def test_the_table_is_one_click_away_and_its_columns_are_filled(page: Page, server: Server, experiment: str):
    page.goto(table_url(server.url, experiment))
    page.locator("label").filter(has=page.locator("input[value=TABLE]")).click()
    filled = {
        "metrics.`evaluate/bits_per_byte`": "1.5",
        "metrics.`pretrain/loss`": "3",
        "metrics.`tokenize/train_tokens`": "500000",
        "metrics.`seconds`": "61.5",
        "params.`pretrain.lr`": "0.003",
        "params.`pretrain.tokens`": "163840",
        "params.`pretrain.batch_tokens`": "4096",
        "params.`pretrain.seed`": "1",
        "attributes.`Description`": "1.5 bits per byte",
    }
    note = page.get_by_role("gridcell", name=filled["attributes.`Description`"], exact=True)
    cells = page.get_by_role("row").filter(has=note).get_by_role("gridcell")
    expect(cells).to_have_count(len(filled))
    for column, text in filled.items():  # the order of columns is by how they came
        expect(cells.and_(page.locator(f'[col-id="{column}"]'))).to_have_text(text)


def test_the_servers_list_of_experiments_leads_to_the_runs(page: Page, server: Server, experiment: str):
    page.goto(server.url)
    page.goto(f"{server.url}/#/experiments")
    page.get_by_role("link", name=RECIPE, exact=True).first.click()
    expect(rows(page)).to_have_count(2)
    assert f"/experiments/{experiment}/runs" in page.url


def test_a_runs_page_is_in_the_same_mode(page: Page, server: Server, experiment: str):
    [run, *_] = server.client.search_runs([experiment], "tags.`llmill.stage` IS NULL")
    page.goto(run_url(server.url, experiment, run.info.run_id))
    expect(page.get_by_test_id("runs-header")).to_contain_text(str(run.info.run_name))
    expect(page.get_by_role("link", name="Models", exact=True)).to_be_visible()


def test_a_runs_description_leads_to_the_page_that_compares_it_with_the_one_before(
    page: Page, server: Server, experiment: str, tmp_path: Path
):
    key, mlflow = f"{1:016x}", Mlflow(tmp_path, server.url)
    about = {"name": "the better one", "store": "store", "command": "llmill run small.yaml"}
    html = '<!doctype html><meta charset="utf-8"><h1>Côte à côte · 并排</h1>'
    said = "1.5 bits per byte  \nAgainst “before”: better (side by side in `evaluate_2/compare.html`)"
    for operation in (
        {"op": "text", "run": key, "name": "evaluate_2/compare.html", "text": html},
        {"op": "note", "run": key, "text": said, **about, "pages": ["evaluate_2/compare.html"]},
    ):
        mlflow.report(RECIPE, operation)
    page.goto(run_url(server.url, experiment, mlflow.ids[key]))
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="evaluate_2/compare.html").click()
    heading = opened.value.frame_locator("iframe").get_by_role("heading", name="Côte à côte · 并排")
    expect(heading).to_be_visible()


@pytest.mark.parametrize("condition", ["IS NULL", "= 'pretrain'"], ids=["whole-run", "training"])
def test_what_the_model_wrote_is_a_table_that_is_paged(
    page: Page, server: Server, experiment: str, condition: str
):
    [run, *_] = server.client.search_runs([experiment], f"tags.`llmill.stage` {condition}")
    page.goto(f"{run_url(server.url, experiment, run.info.run_id).partition('?')[0]}/artifacts")
    page.get_by_text(SAMPLES).first.click()
    for column in COLUMNS:
        expect(page.get_by_role("row").first).to_contain_text(column)
    first = page.get_by_role("row").filter(has_text=WRITTEN.partition("\n")[0]).first
    expect(first).to_contain_text("4096")
    page.get_by_role("listitem").filter(has_text=re.compile("^2$")).click()
    expect(first).not_to_contain_text("4096")


def test_nothing_covers_the_registry(page: Page, server: Server):
    server.client.create_registered_model("a model of ours")
    page.goto(f"{server.url}/#/models")
    page.get_by_role("link", name="a model of ours").click()
    expect(
        page.get_by_test_id("model-view-metadata").or_(page.get_by_text("Created Time")).first
    ).to_be_visible()


def test_an_experiment_of_an_earlier_llmill_is_given_the_view_and_a_persons_own_stay(
    server: Server, tmp_path: Path
):
    client: MlflowClient = server.client
    old = {"mlflow.experiment.primaryMetric.name": "seconds", "mlflow.sharedViewState.mine": "{}"}
    earlier = json.dumps({"name": "llmill", "createdAt": 1, "updatedAt": 1, "state": "{}"})
    of_old = client.create_experiment("of old", tags={**old, TAG: earlier})
    Mlflow(tmp_path, server.url).connect("of old")
    tags = client.get_experiment(of_old).tags
    assert json.loads(tags[TAG])["version"] == VERSION
    assert tags["mlflow.experimentKind"] == OTHER_TAGS["mlflow.experimentKind"]
    assert old.items() <= tags.items()
    assert len(tags[TAG]) <= 5000, "MLflow before 3.2 takes no more"
    Mlflow(tmp_path, server.url).connect("of old")
    assert client.get_experiment(of_old).tags == tags


def test_the_address_of_each_recipes_view_is_printed(
    server: Server, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    views = PipelineRuns(tmp_path).views("http://pages:5000")
    assert views[RECIPE] == table_url("http://pages:5000", experiment)
