"""What the page of a run says in MLflow, in Markdown: what came of it, what the model writes, where to look."""

from __future__ import annotations

import json
from collections.abc import Mapping

from flows.markdown import plain
from flows.store import Artifact
from flows.terminal import headline

MOST_SAMPLES = 3
SAMPLE_CHARACTERS = 400
Outcome = tuple[Artifact, str, float]
"""An artifact, what became of its stage (ran, reused ...), and the seconds that took."""


def run_note(description: str, table: str, results: Mapping[str, Outcome], failure: str, links: str) -> str:
    """All of the note; ``table`` is `summary_table` of the results."""
    parts = [description, f"**Failed**: {plain(failure)}" if failure else "", table, samples(results), links]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def summary_table(results: Mapping[str, Outcome]) -> str:
    """A table with one row a stage."""
    rows = [
        f"| {stage} | {how} | {headline(artifact)} | {seconds:.1f} | `{artifact.fingerprint}` |"
        for stage, (artifact, how, seconds) in results.items()
    ]
    return "\n".join(["| stage | | result | seconds | artifact |", "|---|---|---|---:|---|", *rows]) + "\n"


def samples(results: Mapping[str, Outcome]) -> str:
    """What the evaluated model wrote, where it was evaluated: prompt and continuation, as they are."""
    if "evaluate" not in results:
        return ""
    written = results["evaluate"][0].path / "samples.jsonl"
    lines = written.read_text(encoding="utf-8").splitlines()[:MOST_SAMPLES] if written.exists() else []
    texts = [sample["prompt"] + sample["text"] for sample in map(json.loads, lines)]
    blocks = [f"~~~text\n{text[:SAMPLE_CHARACTERS].replace('~~~', '~ ~ ~')}\n~~~" for text in texts]
    return "\n\n".join(["What the model writes:", *blocks]) if blocks else ""
