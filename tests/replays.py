"""Whole runs of the loader, replayed: which step and row of a batch hold something of which document."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.tokenize.flat import Stream, StreamShard
from data_pipeline.tokenize.shards import TokenShards
from llm.data.loader import Loader, RankSlice
from llm.data.sequences import Sequences
from llm.training.job import Job
from llm.training.recovery import History, skipped_sequences


def documents(tokenize: Path) -> dict[str, np.ndarray]:
    """Id -> tokens of every training document, in order."""
    return {
        name: batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
        for batch in TokenShards(tokenize, "train")
        for row, name in enumerate(batch.ids)
    }


def numbered(job: Job, texts: dict[str, np.ndarray]) -> Sequences:
    """The job's training sequences, in which each token is the number of its document."""
    streams = []
    for source, real in zip(
        job.config.mix.names if job.config.mix else [None], job.corpus.streams("train"), strict=True
    ):
        owners = [
            np.full(len(tokens), number, "<u2")
            for number, (name, tokens) in enumerate(texts.items())
            if source in (None, name.split("/")[0])
        ]
        streams.append(Stream([StreamShard(np.concatenate(owners))]))
        assert len(streams[-1]) == len(real)
    return Sequences(streams, job.model.context)


def replay(job: Job, sequences: Sequences, spikes: dict[int, int]) -> tuple[dict[int, set[Any]], History]:
    """Document -> (step, row, whether it was rolled back) of all that the loader reads, as the trainer asks it."""
    history: History = {"skipped": []}
    config, plan = job.config, job.config.plan

    def samples(step: int) -> tuple[int, int]:
        first, count = config.step_samples(step)
        return first + skipped_sequences(history), count

    taken: list[tuple[int, list[set[int]]]] = []
    found: dict[int, set[Any]] = defaultdict(set)
    left = dict(spikes)
    step = 0
    with Loader(
        sequences, job.corpus.order(sequences.counts), samples, RankSlice(0, 1, 3), config.steps
    ) as loader:
        while step < config.steps:
            rows: list[set[int]] = []
            for batch in loader.micro_batches(step):
                rows += [
                    set(a) | set(b)
                    for a, b in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True)
                ]
            taken.append((step + 1, rows))
            step += 1
            if (target := left.pop(step, None)) is not None:
                passed = plan.sequences_before(step) - plan.sequences_before(target)
                history["skipped"].append({"step": step, "reason": "spike", "windows": passed})
                for number, lost in taken:
                    if number > target:
                        note(found, number, lost, True)
                taken = [(number, rows) for number, rows in taken if number <= target]
                step = target
    for number, rows in taken:
        note(found, number, rows, False)
    return found, history


def note(found: dict[int, set[Any]], step: int, rows: list[set[int]], rolled_back: bool) -> None:
    for row, owners in enumerate(rows):
        for owner in owners:
            found[owner].add((step, row, rolled_back))
