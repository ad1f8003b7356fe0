"""How near a stage's body is to the command that runs it, and how small the classes between them are."""

from __future__ import annotations

import ast
import json
from typing import Any

from command_line import Llmill
from forks import ROOT, Forked

MOST_FRAMES = 8
MOST_LINES = 150
OF_A_RUN = (
    "flows/engine/*.py",
    "flows/prefect/pipeline.py",
    "flows/prefect/host.py",
    "flows/prefect/context.py",
    "flows/listeners/*.py",
)


def test_a_run_reaches_a_body_in_few_frames_of_ours(make_llmill: Any) -> None:
    llmill: Llmill = make_llmill()
    words = ["run", str(llmill.recipe), "--to", "download"]
    run = Forked("flows.prefect.pipeline", "tests.framed_stage", words, llmill.environment())
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, out + err
    [file] = llmill.home.glob("store/download/*/frames.json")
    frames = [f"{name}:{function}" for name, function in json.loads(file.read_text())]
    assert frames[-1].endswith("executor.py:_build")
    assert len(frames) <= MOST_FRAMES, frames


def test_no_class_of_a_run_is_long() -> None:
    files = [file for place in OF_A_RUN for file in sorted(ROOT.glob(place))]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < MOST_LINES, f"{file}: {node.name}"
