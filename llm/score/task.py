"""A model on a task: one row an item, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import binomtest
from tokenizers import Tokenizer

from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.train_tokenizer.tokenizer import CONFIG, content_of, end_of_text, read_object
from llm.data.bits import bits_per_byte
from llm.score.answers import matches, write_answers
from llm.score.config import TaskConfig
from llm.score.encode import Option, encode
from llm.score.items import read_items
from llm.score.prompts import Item, Kind, Prompt, asked, draw_shots, render
from llm.score.replicas import Replicas
from llm.score.scorer import Scored, score

RULES = ("mean", "sum", "bytes")
"""How the options of an item are ranked: by the mean loss of their tokens (CORE: Li et al. 2024, arXiv:2406.11794), by
its sum, and by its sum over their bytes (``acc_norm`` of Gao's lm-evaluation-harness, which counts characters)."""
OWN_RULE: dict[Kind, str] = {"choice": "mean", "schema": "mean", "pairs": "sum"}
"""Kind -> the rule of a task's accuracy. A continuation is right where each of its tokens is the likeliest."""

MOST_TOKENS, STOPS = 32, ("\n",)
"""Tokens of an answer that is generated, and what it ends before, unless a task says otherwise."""

Row = dict[str, Any]
ITEMS = pa.schema(
    [
        ("task", pa.string()),
        ("item", pa.int32()),
        ("gold", pa.int32()),
        ("right", pa.bool_()),
        *((f"chosen_by_{rule}", pa.int32()) for rule in RULES),
        ("nats", pa.list_(pa.float64())),
        ("tokens", pa.list_(pa.int32())),
        ("bytes", pa.list_(pa.int32())),
        ("cut", pa.int32()),
        ("question", pa.string()),
        ("options", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("seen", pa.float64()),
    ]
)
"""Columns of an item's row; the lists have a value for each option, and ``cut`` is how many tokens had no room.
``answer`` is what a model wrote, where it has to; ``seen`` is as a set's documents have it
(`llm.score.sets.DOCUMENTS`)."""


@dataclass(frozen=True)
class PreparedTask:
    """The items of a task that are scored, and their prompts, as texts and as tokens."""

    task: TaskConfig
    items: Sequence[Item]
    prompts: Sequence[Prompt]
    encoded: Sequence[Sequence[Option]]

    @classmethod
    def of(
        cls, task: TaskConfig, file: PinnedFile, tokenizer: Tokenizer, *, first: int, room: int
    ) -> PreparedTask:
        """Read the items; render and encode their prompts.

        Args:
            first: the token that stands before every text.
            room: tokens that a prompt has room for: the model's context.

        Raises:
            UserError: the file can't be read, or a line of it is no item.
        """
        items = read_items(task, file)
        prompts = prompts_of(task, items)
        encoded = [encode(prompt, tokenizer, first, room) for prompt in prompts]
        return cls(task, items[: len(prompts)], prompts=prompts, encoded=encoded)


def prompts_of(task: TaskConfig, items: Sequence[Item]) -> list[Prompt]:
    """Render those of a task's items that are scored."""
    return [
        render(task.kind, item, draw_shots(items, place, task.shots, task.seed), task.delimiter)
        for place, item in enumerate(items[: task.max_items])
    ]


def run_task(
    replicas: Replicas,
    tokenizer: Tokenizer,
    prepared: PreparedTask,
    *,
    sizes: NDArray[np.int32],
    progress: Callable[[int, int], None],
) -> list[Row]:
    """Score a model on a task; return a row an item, in the order of its file.

    Args:
        tokenizer: for answers that the model writes.
        sizes: bytes that each token stands for.
        progress: called with the items done and those there are.
    """
    task, items, encoded = prepared.task, prepared.items, prepared.encoded
    count = len(items)
    rows: list[Row] = [{}] * count
    generates = task.kind == "generation"
    total = 2 * count if generates else count
    for done, (place, scored) in enumerate(score(replicas, encoded), 1):
        row = row_of(task, place, prepared.prompts[place], options=encoded[place], scored=scored, sizes=sizes)
        question, options = asked(task.kind, items[place])
        rows[place] = row | {"question": question, "options": options}
        progress(done, total)
    if generates:
        answers = write_answers(
            replicas.models[0],
            tokenizer,
            [options[0] for options in encoded],
            most=task.max_new_tokens or MOST_TOKENS,
            stops=STOPS if task.stop is None else task.stop,
            progress=lambda done: progress(count + done, total),
        )
        for row, answer in zip(rows, answers, strict=True):
            row |= {"answer": answer, "right": matches(answer, row["options"])}
    return rows


def row_of(
    task: TaskConfig,
    place: int,
    prompt: Prompt,
    *,
    options: Sequence[Option],
    scored: Sequence[Scored],
    sizes: NDArray[np.int32],
) -> Row:
    """Describe an item's outcome."""
    counted = [np.array(option.tokens[option.start :]) for option in options]
    sums = [float(one.nats.sum()) for one in scored]
    text_bytes = [int(sizes[tokens].sum()) for tokens in counted]
    row: Row = {
        "task": task.name,
        "item": place,
        "gold": prompt.gold,
        "nats": sums,
        "tokens": [len(tokens) for tokens in counted],
        "bytes": text_bytes,
        "cut": max(option.cut for option in options),
    }
    ranked = {
        "mean": [float(one.nats.mean()) for one in scored],
        "sum": sums,
        "bytes": [nats / max(1, size) for nats, size in zip(sums, text_bytes, strict=True)],
    }
    for rule in RULES:
        chosen = int(np.argmin(ranked[rule])) if len(options) > 1 else None
        row[f"chosen_by_{rule}"] = chosen
    own = OWN_RULE.get(task.kind)
    row["right"] = row[f"chosen_by_{own}"] == prompt.gold if own else scored[0].greedy
    return row


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute a task's metrics: accuracy with a 95% interval (Wilson 1927), and bits per byte of the right answers.

    ``centred`` is accuracy on a scale where guessing gives 0 and being always right 1.
    """
    right, count = sum(row["right"] for row in rows), len(rows)
    interval = binomtest(right, count).proportion_ci(method="wilson")
    chance = math.fsum(1 / len(row["nats"]) if len(row["nats"]) > 1 else 0 for row in rows) / count
    gold_nats = math.fsum(row["nats"][row["gold"]] for row in rows)
    gold_bytes = sum(row["bytes"][row["gold"]] for row in rows)
    metrics = {
        "accuracy": right / count,
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
        "centred": (right / count - chance) / (1 - chance),
        "gold_bits_per_byte": bits_per_byte(gold_nats, max(1, gold_bytes)),
        "items": float(count),
    }
    if any(row["chosen_by_sum"] is not None for row in rows):
        for rule in RULES:
            hits = sum(row[f"chosen_by_{rule}"] == row["gold"] for row in rows)
            metrics[f"accuracy_by_{rule}"] = hits / count
    cut = sum(row["cut"] > 0 for row in rows)
    return metrics | ({"items_cut": float(cut)} if cut else {})


def first_token(tokenizer: Tokenizer, folder: Path) -> int:
    """Return the token that stands before every text: the ``bos_token`` that a tokenizer's folder names, or the one
    that ends documents."""
    path = folder / CONFIG
    named = content_of(read_object(path).get("bos_token")) if path.is_file() else None
    id = tokenizer.token_to_id(named) if named else None
    return end_of_text(tokenizer) if id is None else int(id)
