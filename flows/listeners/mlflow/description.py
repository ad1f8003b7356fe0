"""The text of a run's page in MLflow, in Markdown: what came of it, what the model writes, where to look."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from data_pipeline.core.text import table
from flows.engine.store import Artifact, Damaged, Store
from flows.headline import headline
from flows.listeners.markdown import code, link, plain
from flows.listeners.mlflow.links import artifact_url

SAMPLES, FAILED = "What the model writes:", "**Failed**: "
TABLES = ("| step |", "| stage |")  # how the table begins, now and in older versions
MOST_SAMPLES = 3
SAMPLE_CHARACTERS = 400
NOTE = "mlflow.note.content"
NOTE_LENGTH = 7900  # the longest value of a tag that MLflow takes, about
Outcome = tuple[Artifact, str, float]
"""An artifact, what became of its step (ran, reused ...), and the seconds that took."""


def clipped(text: str) -> str:
    return text if len(text) <= NOTE_LENGTH else text[: NOTE_LENGTH - 1] + "…"


def outcomes(results: Iterable[Mapping[str, Any]], store: Store) -> dict[str, Outcome]:
    """Step -> outcome, of those whose artifact is still there."""
    found: dict[str, Outcome] = {}
    for one in results:
        with suppress(Damaged):
            if artifact := store.get(one["stage"], one["fingerprint"]):
                found[one["step"]] = (artifact, one["how"], one["seconds"])
    return found


def run_note(
    description: str,
    results: Mapping[str, Outcome],
    compared: Iterable[Mapping[str, str]] = (),
    *,
    failure: str = "",
    quoting: bool = True,
) -> str:
    """The note without its links; without samples where it should quote no text.

    Its first line is all that MLflow's table of runs shows of it; its first paragraph is what the run's page shows, and
    lets one click, before it is unfolded.
    """
    written = samples(results) if quoting else ""
    parts = [
        "  \n".join(filter(None, (evaluated(results), *against(compared)))),
        description,
        f"{FAILED}{plain(failure)}" if failure else "",
        summary_table(results),
        written,
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def against(compared: Iterable[Mapping[str, str]]) -> Iterable[str]:
    """Say how the run's models compare with those of the run before."""
    for one in compared:
        verdict = f"Against “{plain(one['before'])}”: {plain(one['verdict'])}"
        yield f"{verdict} (side by side in `{one['page']}`)"


def evaluated(results: Mapping[str, Outcome]) -> str:
    """The headline of the last evaluation; empty where there was none."""
    found = [artifact for artifact, _, _ in results.values() if artifact.stage == "evaluate"]
    return headline("evaluate", found[-1].metrics) if found else ""


def links(name: str, url: str, table: str, *, store: str, command: str) -> str:
    """Where else to look, in Markdown; ``url`` and ``table`` are empty where no server shows MLflow's pages."""
    mlflow = f"MLflow run “{name}”; `llmill ui` shows it"
    if url:
        shown = {f"run “{name}” in MLflow": url, "all runs of the recipe": table}
        mlflow = " · ".join(link(text, address) for text, address in shown.items())
    return f"{mlflow}\n\nartifacts: {code(store)}\n\nagain by hand: {code(command)}\n"


def with_pages(text: str, url: str, pages: Iterable[str]) -> str:
    """Have the names of a run's artifacts in a note lead to them, where a server shows the run under ``url``."""
    for page in pages if url else ():
        text = text.replace(f"`{page}`", f"[`{page}`](<{artifact_url(url, page)}>)")
    return text


def summary_table(results: Mapping[str, Outcome]) -> str:
    """A table with one row a step."""
    rows = [
        (
            step,
            how,
            headline(artifact.stage, artifact.metrics),
            f"{seconds:.1f}",
            f"`{artifact.fingerprint}`",
        )
        for step, (artifact, how, seconds) in results.items()
    ]
    return table(("step", "", "result", "seconds", "artifact"), rows, ["---", "---", "---", "---:", "---"])


def samples(results: Mapping[str, Outcome]) -> str:
    """Return what the evaluated model wrote, where it was evaluated: prompt and continuation, as they are."""
    lines: list[str] = []
    for artifact, _, _ in results.values():
        written = artifact.path / "samples.jsonl"
        if artifact.stage == "evaluate" and written.exists():
            lines += written.read_text(encoding="utf-8").splitlines()[:MOST_SAMPLES]
    texts = [sample["prompt"] + sample["text"] for sample in map(json.loads, lines)]
    blocks = [f"~~~text\n{text[:SAMPLE_CHARACTERS].replace('~~~', '~ ~ ~')}\n~~~" for text in texts]
    return "\n\n".join([SAMPLES, *blocks]) if blocks else ""


def without_texts(note: str) -> str:
    """A note that quotes nothing: without samples and what follows them, and without the words of a failure."""
    kept = note.partition(SAMPLES)[0]
    head, failed, rest = kept.partition(FAILED)
    begins = max(map(rest.rfind, TABLES))
    return (head + rest[begins:] if failed and begins >= 0 else head).rstrip()
