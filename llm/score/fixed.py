"""The scores of a model on sets and tasks, each made once, whatever is killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from data_pipeline.core.files import atomic_path
from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.train_tokenizer.tokenizer import end_of_text, token_bytes
from llm.data.bits import bits_per_byte
from llm.score.config import FixedConfig, SetConfig, TaskConfig
from llm.score.replicas import Replicas
from llm.score.report import sets_table, tasks_table
from llm.score.seen import NOT_HERE, of_seen, seen_table
from llm.score.sets import DOCUMENTS, TOKENS, PreparedSet, run_set
from llm.score.statistics import interval
from llm.score.task import ITEMS, PreparedTask, first_token, run_task, summarise

Row = dict[str, Any]
SET = pa.unify_schemas([DOCUMENTS, TOKENS])
"""Columns of a set's scores until they are done."""


@dataclass(frozen=True)
class Fixed:
    """The rows of all sets and tasks, by their names."""

    sets: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    tasks: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    tokens: Sequence[pa.Table] = ()
    """The documents of each set token by token (`llm.score.sets.TOKENS`)."""
    unsought: str = NOT_HERE
    """Why it was not looked for in the training documents; empty where it was."""
    searched: int = 0
    """Bytes of the training documents in which it was looked for."""

    @cached_property  # intervals take a second each
    def metrics_of_sets(self) -> dict[str, Metrics]:
        """Set -> its metrics."""
        return {name: self._metrics(rows, summarise_set) for name, rows in self.sets.items()}

    @cached_property
    def metrics_of_tasks(self) -> dict[str, Metrics]:
        """Task -> its metrics."""
        return {name: self._metrics(rows, summarise) for name, rows in self.tasks.items()}

    def _metrics(self, rows: Sequence[Row], summarised: Callable[[Sequence[Row]], Metrics]) -> Metrics:
        metrics = summarised(rows)
        return metrics if self.unsought else metrics | of_seen(rows, metrics, summarised)

    def metrics(self) -> Metrics:
        """All metrics, each under the name of its set or task; with the mean over tasks where there are several."""
        tasks = self.metrics_of_tasks
        found = {
            f"{name}/{metric}": value
            for name, one in {**self.metrics_of_sets, **tasks}.items()
            for metric, value in one.items()
        }
        if len(tasks) > 1:
            found["centred_mean"] = math.fsum(one["centred"] for one in tasks.values()) / len(tasks)
        return found if self.unsought else found | {"searched_bytes": float(self.searched)}

    def write(self, out: Path) -> None:
        """Write ``set_documents.parquet``, ``set_tokens.parquet`` and ``items.parquet``, where there are any."""
        tables = {"set_tokens.parquet": pa.concat_tables(self.tokens)} if self.tokens else {}
        for name, schema, rows in (
            ("set_documents.parquet", DOCUMENTS, self.sets),
            ("items.parquet", ITEMS, self.tasks),
        ):
            if rows:
                tables[name] = pa.Table.from_pylist([row for one in rows.values() for row in one], schema)
        for name, table in tables.items():
            with atomic_path(out / name) as path:
                pq.write_table(table, path, compression="zstd")


def score_fixed(
    replicas: Replicas,
    tokenizer: Tokenizer,
    config: FixedConfig,
    *,
    folder: Path,
    out: Path,
    context: StageContext,
) -> Fixed:
    """Score the model on the sets and tasks of a resolved config; ``folder`` is the tokenizer's."""
    sizes, scratch = token_bytes(folder), out / "scratch"
    end, first = end_of_text(tokenizer), first_token(tokenizer, folder)

    def progress(unit: str) -> Callable[[int, int], None]:
        return lambda done, total: context.progress(done, total, unit)

    def of_set(one: SetConfig, file: PinnedFile) -> list[Row]:
        prepared = PreparedSet.of(one, file, tokenizer)
        return run_set(replicas, prepared, end=end, sizes=sizes, progress=progress(f"tokens of {one.name}"))

    def of_task(task: TaskConfig, file: PinnedFile) -> list[Row]:
        prepared = PreparedTask.of(task, file, tokenizer, first=first, room=replicas.context)
        return run_task(
            replicas, tokenizer, prepared, sizes=sizes, progress=progress(f"items of {task.name}")
        )

    sets, tasks, tokens = {}, {}, []
    for one, file in zip(config.sets, config.set_files, strict=True):
        table = kept(scratch / "sets" / f"{one.name}.parquet", SET, partial(of_set, one, file))
        tokens.append(table.select(TOKENS.names))
        sets[one.name] = table.select(DOCUMENTS.names).to_pylist()
        if changed := sum(not row["as_it_is"] for row in sets[one.name]):
            context.note(f"{one.name}: the tokenizer changes {changed:,} of its texts", warning=True)
    for task, file in zip(config.tasks, config.task_files, strict=True):
        table = kept(scratch / "tasks" / f"{task.name}.parquet", ITEMS, partial(of_task, task, file))
        tasks[task.name] = table.to_pylist()
        if cut := sum(row["cut"] > 0 for row in tasks[task.name]):
            context.note(f"{task.name}: {cut:,} items are longer than the context, and cut at the left")
    return Fixed(sets, tasks, tokens=tokens)


def tables(fixed: Fixed) -> list[str]:
    """Make the tables of a report, in Markdown; none of what there is nothing of."""
    sets, tasks = fixed.metrics_of_sets, fixed.metrics_of_tasks
    made = sets_table(sets), tasks_table(tasks), seen_table({**sets, **tasks}, fixed.unsought)
    return [*filter(None, made)] if sets or tasks else []


def kept(path: Path, schema: pa.Schema, make: Callable[[], list[Row]]) -> pa.Table:
    """Return the table in a file, which is made where an earlier attempt has not made it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = make()
        with atomic_path(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    return pq.read_table(path)


def summarise_set(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """Compute a set's metrics: bits per byte with its interval over documents, and by overlapping windows."""
    size = sum(row["bytes"] for row in rows)
    metrics = {
        "bits_per_byte": bits_per_byte(math.fsum(row["text_nats"] for row in rows), size),
        **interval(rows),
        "documents": float(len(rows)),
        "bytes": float(size),
    }
    if all(row["sliding_nats"] is not None for row in rows):
        metrics["sliding_bits_per_byte"] = bits_per_byte(math.fsum(row["sliding_nats"] for row in rows), size)
    return metrics
