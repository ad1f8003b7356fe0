"""The stage ``adopt``: seals what was made elsewhere (a tokenizer, a model with its tokenizer, documents, tokens) as an
artifact like those that llmill makes, so that the steps after it need not know the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import first_line, table
from data_pipeline.stage import Metrics, StageContext
from llm.adopt.config import AdoptConfig
from llm.adopt.files import Files, Kind, find_files
from llm.adopt.hub import download
from llm.adopt.shards import adopt_documents, adopt_tokens
from llm.adopt.tokenizer import examine, special_tokens, write
from llm.model.files import Unsupported

Work = Callable[[AdoptConfig, Files, Path, Path, StageContext], Metrics]


def adopt(config: AdoptConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Write what the config names as a stage of ours would have, and ``report.md``.

    Raises:
        UserError: it is damaged, or nothing that llmill can use.
        ConnectionError: the hub can't be reached.
    """
    config = config.resolve()
    path = config.path or fetched(config, out / "scratch" / "hub")
    files = find_files(path, config.type, any_architecture=config.any_architecture)
    metrics = WORK[config.type](config, files, path, out, context)
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(report(config, metrics), encoding="utf-8")
    return metrics


def fetched(config: AdoptConfig, folder: Path) -> Path:
    """Return the folder with what lies on the hub."""
    assert config.hub is not None
    assert config.revision is not None, "resolve() the config first"
    download(config.hub, config.revision, config.type, folder)
    return folder


def tokenizer(config: AdoptConfig, files: Files, path: Path, out: Path, context: StageContext) -> Metrics:
    """Adopt a tokenizer."""
    examined = examine(files, config.end_of_text, path)
    for line in examined.notes:
        context.note(line)
    write(examined, files, out)
    special = float(len(special_tokens(examined.tokenizer)))
    return {"vocab_size": float(examined.size), "special_tokens": special}


def model(config: AdoptConfig, files: Files, path: Path, out: Path, context: StageContext) -> Metrics:
    """Adopt a model, with the tokenizer beside it."""
    from llm.adopt.model import (
        adopt_foreign,
        adopt_model,
        read_sealed,
    )  # torch, which other types need not wait for

    metrics = tokenizer(config, files, path, out, context)
    if (out / "model.json").exists() and (out / "model.safetensors").exists():  # the last file
        return {**read_sealed(out), **metrics}
    try:
        return {**adopt_model(path, out, context), **metrics}
    except Unsupported as error:
        if not config.any_architecture:
            raise
        context.note(f"{first_line(error)}\nso transformers computes it; it can be scored, and nothing else")
    return {**adopt_foreign(path, files, out), **metrics}


def documents(config: AdoptConfig, files: Files, path: Path, out: Path, context: StageContext) -> Metrics:
    """Adopt documents."""
    return adopt_documents(files, out, context)


def tokens(config: AdoptConfig, files: Files, path: Path, out: Path, context: StageContext) -> Metrics:
    """Adopt tokens."""
    return adopt_tokens(files, out, context)


WORK: dict[Kind, Work] = {"tokenizer": tokenizer, "model": model, "documents": documents, "tokens": tokens}


def report(config: AdoptConfig, metrics: Metrics) -> str:
    """Return the stage's report in Markdown: what is known of where it comes from, and its metrics."""
    given = {name: value for name, value in config.identity().items() if value is not None}
    counts = [(name, f"{value:,.0f}") for name, value in metrics.items()]
    return f"# Adopted: a {config.type}\n\n{table(('', ''), [*given.items(), *counts])}"
