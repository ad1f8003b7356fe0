"""The page of a run, as Prefect's own pages draw it in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from browser import SECONDS, open_browser
from operator_api import Prefect
from playwright.sync_api import expect

PROGRAM = """
from prefect import flow
from prefect.client.orchestration import get_client
from flows.listeners.flow_page import FlowPage

@flow(name="of-a-page")
def some_flow(): ...

with get_client(sync_client=True) as client:
    flow_run = str(client.create_flow_run(some_flow).id)
page = FlowPage(flow_run, "書 book[s]")
rows = [
    {"stage": "clean", "state": "sealed", "seconds": 12.5, "fingerprint": "4c9e7713deccb87c"},
    {"stage": "pretrain", "state": "running", "seconds": None, "fingerprint": ""},
]
page.stages(rows, "stages of the run")
page.progress(50, "pretrain: 100 of 200 steps")
page.links("[the run in MLflow](http://127.0.0.1:5000)", "links")
page.close()
print(flow_run)
"""


def test_the_table_of_stages_and_the_other_artifacts_open_in_both_of_prefects_pages(prefect_server):
    """Again after each upgrade of Prefect: what a page takes for a table is written nowhere."""
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    flow_run = made.stdout.split()[-1]
    found = Prefect(prefect_server).post(
        "artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run]}, "type": {"not_any_": ["result"]}}
    )
    shown = {"table": "4c9e7713deccb87c", "markdown": "the run in MLflow", "progress": "100 of 200 steps"}
    assert {entry["type"] for entry in found} == set(shown)
    with open_browser() as opened:
        faults: list[str] = []
        opened.on("pageerror", lambda error: faults.append(str(error)))
        for entry in found:
            for pages in ("", "/v2"):
                opened.goto(f"{prefect_server.removesuffix('/api')}{pages}/artifacts/artifact/{entry['id']}")
                text = opened.get_by_text(re.compile(re.escape(shown[entry["type"]]))).first
                expect(text).to_be_visible(timeout=SECONDS * 1000)
        assert faults == []
