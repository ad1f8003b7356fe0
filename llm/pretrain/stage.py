"""The pretrain stage: token shards to a trained model. Here is what a recipe may set (`PretrainConfig`), and the body,
which checks that it can be done, has the ranks started (`llm.training.trainer` is what each of them runs; they read the
token shards where they lie) and turns what they leave behind into the artifact. A body started again after a kill goes
on from the newest whole checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.tokenize.flat import FlatTokens
from data_pipeline.train_tokenizer.tokenizer import special_tokens
from llm.data import order as batches
from llm.model.config import ModelConfig
from llm.model.layouts import require_start
from llm.pretrain.config import PretrainConfig
from llm.pretrain.summary import describe_reading, describe_scoring, summarise
from llm.training.events import read_events
from llm.training.job import Job, as_begun, train


def pretrain(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model on the shards of ``inputs["tokens"]``; see the module's docstring.

    Leaves ``model.safetensors``, ``model.json``, ``losses.parquet``, ``validation.parquet``, ``sources.json`` (what was
    read of each source) and ``report.md``; and ``skipped.parquet`` where steps or batches were skipped (see
    `llm.training.recovery`).

    Raises:
        UserError: the corpus is smaller than one batch; more ranks than fit; a checkpoint of another precision.
    """
    config = config.resolve()
    for line in config.predict({}, 1):
        context.note(line)
    if config.model.logit_softcap is not None:
        context.note("no layout of transformers has model.logit_softcap: export will refuse it", warning=True)
    if not (out / "model.safetensors").exists():  # the last file that the ranks write
        train(prepare(config, inputs, out, context), context)
    for line, warning in describe_scoring(read_events(out / "logs" / "events.jsonl")):
        context.note(line, warning=warning)
    return summarise(config, out)


def prepare(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Job:
    """Check what can be checked before a rank starts, and write down what will be read."""
    train, held_out = FlatTokens(inputs["tokens"], "train"), FlatTokens(inputs["tokens"], "val")
    train.vocabulary.require_tokenizer(inputs["tokenizer"], inputs["tokens"])
    model = ModelConfig(**config.model.model_dump(), vocab_size=train.vocabulary.size)
    if config.init_from is not None:
        tokenizer = inputs["tokenizer"]
        require_start(model, config.init_from, special_tokens(tokenizer), tokenizer)
    job = as_begun(
        Job(config=config, model=model, tokens=inputs["tokens"], tokenizer=inputs["tokenizer"], out=out)
    )
    batches.require_batch(train.tokens, model.context, config.batch_tokens)
    if held_out.tokens <= model.context:
        raise UserError(
            f"the held-out split has {held_out.tokens:,} tokens, less than one sequence of {model.context:,}:\n"
            "lower pretrain.model.context, or raise tokenize.val_fraction"
        )
    corpus = job.corpus
    left_out = corpus.left_out()
    reading = corpus.reading(config.plan.sequences_before(config.steps))
    with atomic_path(out / "sources.json") as path:
        path.write_text(json.dumps(reading, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for line in describe_reading(config, reading):
        context.note(line)
    if left_out:
        named = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in left_out.items())
        context.note(f"pretrain.mixture leaves out {named}", warning=True)
    return job
