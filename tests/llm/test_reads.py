"""What `llm.data.reads` works out is what the loader reads: compared with replays of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replays import documents, numbered, replay

from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.lookup import TokenPlace, find_tokens, start_in_source
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from llm.data.reads import Training
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import prepare
from llm.training.job import Job
from llm.training.schedule import BatchPlan

CONTEXT = 32
LAYOUT = TokenizeConfig(val_fraction=0.2, shard_tokens=30_000)
SPIKES = {9: 4, 12: 10, 17: 10}
"""After which step (when it comes first, second, ...) a replay goes back to which."""
RECIPES: dict[str, dict[str, Any]] = {
    "less than an epoch": {"tokens": 40 * 8 * CONTEXT},
    "several epochs": {"tokens": 1200 * 8 * CONTEXT},
    "a batch that grows": {
        "tokens": 900 * 8 * CONTEXT,
        "schedule": {"batch_warmup": {"start_tokens": 2 * CONTEXT, "share": 0.3}},
    },
    "a mixture": {"tokens": 700 * 8 * CONTEXT, "mixture": {"stdlib": 2, "email": 1}},
    "a mixture that leaves a source out": {"tokens": 300 * 8 * CONTEXT, "mixture": {"email": 1}},
}


@pytest.fixture(scope="module")
def shards(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus in several token shards."""
    folder = tmp_path_factory.mktemp("tokenize")
    tokenize(LAYOUT, corpus, folder, LocalContext())
    assert len(list(folder.glob("train-*.parquet"))) > 3
    return {**corpus, "tokens": folder}


def begun(fields: dict[str, Any], shards: dict[str, Path], out: Path) -> Job:
    model = {"layers": 1, "heads": 2, "width": 16, "context": CONTEXT}
    values = {"model": model, "batch_tokens": 8 * CONTEXT, "precision": "fp32", **fields}
    return prepare(PretrainConfig.model_validate(values), shards, out, LocalContext())


@pytest.mark.parametrize("spikes", [{}, SPIKES], ids=["undisturbed", "rolled back"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_read_of_a_document_is_worked_out_and_no_other(
    recipe: str, spikes: dict[int, int], shards: dict[str, Path], tmp_path: Path
) -> None:
    job = begun(RECIPES[recipe], shards, tmp_path)
    texts = documents(shards["tokens"])
    sequences, config = numbered(job, texts), job.config
    read, history = replay(job, sequences, spikes)
    training = Training(config, config.steps, history["skipped"])
    real, order = job.corpus.sequences("train"), job.corpus.order(sequences.counts)
    names = config.mix.names if config.mix else (None,)
    counts = dict(zip(names, sequences.counts, strict=True))
    chosen = np.random.default_rng(0).choice(len(texts), 40, replace=False).tolist()
    again = 0
    for number in [0, len(texts) - 1, *chosen]:
        name, tokens = list(texts.items())[number]
        place = find_tokens(LAYOUT, shards["tokens"], name)
        assert place is not None
        source = name.split("/")[0] if config.mix else None
        start = start_in_source(shards["tokens"], place, name) if source else place.start
        found = training.reads(start, start + place.tokens, counts.get(source, 0), source)
        assert {(one.step, one.row, one.fate == "rolled back") for one in found} == read[number], name
        again += max((one.epoch for one in found), default=0)
        for one in found[:20]:
            offset = one.sequence * CONTEXT
            mine = tokens[max(0, offset - start) : offset + CONTEXT + 1 - start]
            assert one.end - one.first == len(mine)
            if not spikes:
                first, _ = config.step_samples(one.step - 1)
                batch = real.take(order(first + one.row, 1))
                seen = [*batch.tokens_BT[0].tolist(), int(batch.targets_BT[0, -1])]
                assert seen[one.first : one.end] == mine.tolist()
    assert any(read.values())
    assert (again > 0) == (recipe != "less than an epoch"), "texts are read again where the recipe says so"


def test_a_run_that_is_not_over_says_what_it_has_not_read_yet_and_what_moved_nothing(
    shards: dict[str, Path], tmp_path: Path
) -> None:
    config = begun(RECIPES["several epochs"], shards, tmp_path).config
    skipped = [{"step": 30, "reason": "nonfinite", "windows": 0}]
    name = max(documents(shards["tokens"]).items(), key=lambda item: len(item[1]))[0]
    place = find_tokens(LAYOUT, shards["tokens"], name)
    assert place is not None
    sequences = (sum(map(len, documents(shards["tokens"]).values())) - 1) // CONTEXT
    whole, half = (
        Training(config, done, skipped).reads(place.start, place.start + place.tokens, sequences)
        for done in (config.steps, 600)
    )
    assert {one.fate for one in whole} <= {"trained", "not finite"}
    assert [one._replace(fate="trained") for one in half] == [one._replace(fate="trained") for one in whole]
    assert {one.fate for one in half if one.step > 600} == {"not yet"}
    everything = Training(config, 600, skipped).reads(0, sequences * CONTEXT, sequences)
    assert {one.step for one in everything if one.fate == "not finite"} == {30}


@given(
    stairs=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4),
    sequence=st.integers(0, 10**6),
)
def test_a_window_of_a_batch_plan_knows_its_step(stairs: list[tuple[int, int]], sequence: int) -> None:
    plan = BatchPlan(tuple(stairs))
    step = plan.step_of(sequence)
    assert plan.sequences_before(step) <= sequence < plan.sequences_before(step + 1)


def test_every_document_is_found_in_its_token_shard_and_others_are_not(shards: dict[str, Path]) -> None:
    folder = shards["tokens"]
    for split in ("train", "val"):
        start = 0
        for batch in TokenShards(folder, split):
            for row, name in enumerate(batch.ids):
                place = find_tokens(LAYOUT, folder, name)
                length = int(batch.offsets[row + 1] - batch.offsets[row])
                assert place == TokenPlace(
                    split=split,
                    shard=place.shard,
                    row_group=place.row_group,
                    row=row,
                    tokens=length,
                    start=start,
                ), name
                start += length
    assert find_tokens(LAYOUT, folder, "stdlib/nowhere.py") is None


def test_a_token_shard_of_many_row_groups_is_searched_by_halves(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data_pipeline.tokenize.lookup as lookup
    import data_pipeline.tokenize.merge as merge

    monkeypatch.setattr(merge, "ROW_GROUP_TOKENS", 1000)
    layout = TokenizeConfig(val_fraction=0.2)
    tokenize(layout, corpus, tmp_path, LocalContext())
    texts = documents(tmp_path)
    hashed: list[pa.Array] = []
    monkeypatch.setattr(lookup, "hash_column", lambda ids, salt: hashed.append(ids) or runs_hash(ids, salt))
    start = 0
    for name, tokens in texts.items():
        hashed.clear()
        place = find_tokens(layout, tmp_path, name)
        assert place
        assert (place.start, place.tokens) == (start, len(tokens))
        assert len(hashed) <= 10, "of the id itself, of log2 of the groups, and of its group"
        start += len(tokens)
    assert start > 100_000, "of more than a hundred row groups"


def runs_hash(ids: pa.Array, salt: str) -> np.ndarray:
    from data_pipeline.hashing import hash_column

    return hash_column(ids, salt)
