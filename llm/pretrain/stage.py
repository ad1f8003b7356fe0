"""The pretrain stage: token shards to a trained model. Here is what a recipe may set (`PretrainConfig`), and the body,
which checks that it can be done, has the ranks started (`llm.training.trainer` is what each of them runs; they read the
token shards where they lie) and turns what they leave behind into the artifact. A body started again after a kill goes
on from the newest whole checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.tokenize.flat import FlatTokens
from data_pipeline.train_tokenizer.tokenizer import special_tokens
from llm.data import order as batches
from llm.model.config import ModelConfig
from llm.model.layouts import require_start
from llm.pretrain import branches
from llm.pretrain.config import PretrainConfig
from llm.pretrain.start import Start, read_start, write_start
from llm.pretrain.summary import describe_reading, describe_scoring, summarise
from llm.training import checkpoint
from llm.training.events import read_events, write_events
from llm.training.job import Job, as_begun, train


def pretrain(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model on the shards of ``inputs["tokens"]``; see the module's docstring.

    Leaves ``model.safetensors``, ``model.json``, ``losses.parquet``, ``validation.parquet``, ``sources.json`` (what was
    read of each source) and ``report.md``; ``skipped.parquet`` where steps or batches were skipped (see
    `llm.training.recovery`); and ``branches`` where some are kept (see `llm.pretrain.branches`).

    Raises:
        UserError: the corpus is smaller than one batch; more ranks than fit; a checkpoint of another precision.
    """
    config = config.resolve()
    for line in config.predict({}, 1):
        context.note(line)
    if config.model.logit_softcap is not None:
        context.note("no layout of transformers has model.logit_softcap: export will refuse it", warning=True)
    if not (out / "model.safetensors").exists():  # the last file that the ranks write
        job = prepare(config, inputs, out, context)
        begin_at_branch(job, inputs, context)
        train(job, context)
    if config.kept_steps:
        branches.write_index(config.course, fingerprints(inputs), out)
    for line, warning in describe_scoring(read_events(out / "logs" / "events.jsonl")):
        context.note(line, warning=warning)
    return summarise(config, out)


def fingerprints(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return the fingerprints of sealed inputs: the names of their folders."""
    return {type_: folder.name for type_, folder in inputs.items()}


def begin_at_branch(job: Job, inputs: Mapping[str, Path], context: StageContext) -> None:
    """Have a training that has not begun go on from the last branch point of another that it passes, where that
    computed alike; with that one's events up to there."""
    if job.checkpoints.exists() or job.resolved is None:
        return
    config = job.config
    found = {}
    for step, folder in branches.find(job.out.parent, config.course, fingerprints(inputs)).items():
        record = checkpoint.read_record(folder)
        if record is None or record.setup != job.setup:
            context.note(
                f"step {step:,} of {folder.parents[1].name} was computed otherwise: not gone on from it"
            )
        elif problem := checkpoint.damage(folder.parent, record):
            context.note(f"step {step:,} of {folder.parents[1].name}: {problem}", warning=True)
        else:
            found[step] = folder
    newest = branches.newest(found, config.course)
    if newest is None:
        return
    context.note(config.describe_start(newest, found[newest]))
    events = read_events(found[newest].parents[1] / "logs" / "events.jsonl")
    write_events(job.events, [event for event in events if is_passed(event, newest, config)])
    for step in sorted(
        step for step in found if step == newest or (step in config.kept_steps and step < newest)
    ):
        checkpoint.copy(found[step], checkpoint.folder_of(job.checkpoints, step))


def is_passed(event: Mapping[str, Any], until: int, config: PretrainConfig) -> bool:
    """Whether a training logs an event of another that is the same up to step ``until``."""
    runtime = config.runtime
    every = {
        "step": runtime.log_every,
        "norms": runtime.norms_every,
        "validation": runtime.validation.every,
        "samples": config.samples_every,
        "scores": config.scores_every,
        "skip": 1,
    }.get(event["event"], 0)
    return event["event"] == "start" or bool(every and event["step"] <= until and event["step"] % every == 0)


def begin_with(
    config: PretrainConfig, model: ModelConfig, inputs: Mapping[str, Path], out: Path, context: StageContext
) -> Start:
    """Find what training begins with, in the model that it was given; say it, and write it down."""
    start = read_start(config, model, inputs)
    for line in start.lines():
        context.note(line)
    write_start(start, out)
    return start


def prepare(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Job:
    """Check what can be checked before a rank starts, and write down what will be read."""
    train, held_out = FlatTokens(inputs["tokens"], "train"), FlatTokens(inputs["tokens"], "val")
    train.vocabulary.require_tokenizer(inputs["tokenizer"], inputs["tokens"])
    model = ModelConfig(**config.model.model_dump(), vocab_size=train.vocabulary.size)
    if config.init_from is not None:
        tokenizer = inputs["tokenizer"]
        require_start(model, config.init_from, special_tokens(tokenizer), tokenizer)
    start = begin_with(config, model, inputs, out, context) if "model" in inputs else None
    job = as_begun(
        Job(
            config=config,
            model=model,
            tokens=inputs["tokens"],
            tokenizer=inputs["tokenizer"],
            out=out,
            start=start.model if start else None,
            branch=start.branch if start else None,
            keep_optimizer=config.start.optimizer == "keep",
            samples_before=start.samples if start else 0,
        )
    )
    batches.require_batch(train.tokens, model.context, config.batch_tokens)
    if held_out.tokens <= model.context:
        raise UserError(
            f"the held-out split has {held_out.tokens:,} tokens, less than one sequence of {model.context:,}:\n"
            "lower pretrain.model.context, or raise tokenize.val_fraction"
        )
    corpus = job.corpus
    left_out = corpus.left_out()
    reading = corpus.reading(config.plan.sequences_before(config.steps), job.samples_before)
    with atomic_path(out / "sources.json") as path:
        path.write_text(json.dumps(reading, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for line in describe_reading(config, reading):
        context.note(line)
    if left_out:
        named = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in left_out.items())
        context.note(f"pretrain.mixture leaves out {named}", warning=True)
    return job
