"""What the page of a run says in MLflow, in Markdown: what came of it, what the model writes, where to look."""

from __future__ import annotations

import json
from collections.abc import Mapping

from data_pipeline.core.text import table
from flows.engine.store import Artifact
from flows.listeners.markdown import plain
from flows.listeners.terminal import headline

SAMPLES, FAILED, TABLE = "What the model writes:", "**Failed**: ", "| stage |"
MOST_SAMPLES = 3
SAMPLE_CHARACTERS = 400
Outcome = tuple[Artifact, str, float]
"""An artifact, what became of its stage (ran, reused ...), and the seconds that took."""


def run_note(
    description: str,
    results: Mapping[str, Outcome],
    *,
    failure: str = "",
    links: str = "",
    quoting: bool = True,
) -> str:
    """All of the note; without samples where it should quote no text."""
    written = samples(results) if quoting else ""
    parts = [
        description,
        f"{FAILED}{plain(failure)}" if failure else "",
        summary_table(results),
        written,
        links,
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def summary_table(results: Mapping[str, Outcome]) -> str:
    """A table with one row a stage."""
    rows = [
        (stage, how, headline(artifact), f"{seconds:.1f}", f"`{artifact.fingerprint}`")
        for stage, (artifact, how, seconds) in results.items()
    ]
    return table(("stage", "", "result", "seconds", "artifact"), rows, ["---", "---", "---", "---:", "---"])


def samples(results: Mapping[str, Outcome]) -> str:
    """What the evaluated model wrote, where it was evaluated: prompt and continuation, as they are."""
    if "evaluate" not in results:
        return ""
    written = results["evaluate"][0].path / "samples.jsonl"
    lines = written.read_text(encoding="utf-8").splitlines()[:MOST_SAMPLES] if written.exists() else []
    texts = [sample["prompt"] + sample["text"] for sample in map(json.loads, lines)]
    blocks = [f"~~~text\n{text[:SAMPLE_CHARACTERS].replace('~~~', '~ ~ ~')}\n~~~" for text in texts]
    return "\n\n".join([SAMPLES, *blocks]) if blocks else ""


def without_texts(note: str) -> str:
    """A note that quotes nothing: without samples and what follows them, and without the words of a failure."""
    kept = note.partition(SAMPLES)[0]
    head, failed, rest = kept.partition(FAILED)
    return (head + rest[rest.rfind(TABLE) :] if failed and TABLE in rest else head).rstrip()
