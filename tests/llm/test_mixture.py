"""The laws of mixing, and a training that follows them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.shards import TokenShards
from llm.data.mixture import PERIOD_STEPS, Mixture
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import prepare
from llm.training.job import Job

WEIGHTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.floats(0.1, 10), min_size=1, max_size=7
)


def share(weights: dict[str, float], name: str) -> Fraction:
    return Fraction(weights[name]) / sum(map(Fraction, weights.values()))


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, batch=st.integers(1, 9), step=st.integers(0, 10**9))
def test_any_thousand_steps_are_exact_to_within_one_window(
    weights: dict[str, float], batch: int, step: int
) -> None:
    mixture = Mixture.of(weights, batch)
    samples = np.arange(step * batch, (step + PERIOD_STEPS) * batch)
    found = np.bincount(mixture.positions(samples)[0], minlength=len(weights))
    assert found.sum() == PERIOD_STEPS * batch
    for name, count in zip(mixture.names, found.tolist(), strict=True):
        assert abs(count - share(weights, name) * PERIOD_STEPS * batch) < 1


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, batch=st.integers(1, 4))
def test_the_windows_of_a_source_lie_evenly(weights: dict[str, float], batch: int) -> None:
    mixture = Mixture.of(weights, batch)
    sources, _ = mixture.positions(np.arange(mixture.period))
    for source, count in enumerate(mixture.counts):
        off = np.cumsum(sources == source) - np.arange(1, mixture.period + 1) * (count / mixture.period)
        assert off.min() > -1
        assert off.max() < 1 + math.log(len(weights)) + 1e-9


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, batch=st.integers(1, 4), first=st.integers(0, 10**12), count=st.integers(1, 500))
def test_a_slot_knows_its_place_without_those_before_it(
    weights: dict[str, float], batch: int, first: int, count: int
) -> None:
    mixture = Mixture.of(weights, batch)
    sources, positions = mixture.positions(np.arange(first, first + count))
    expected = mixture.read_before(first)
    for source, place in zip(sources.tolist(), positions.tolist(), strict=True):
        assert place == expected[source]
        expected[source] += 1
    assert expected == mixture.read_before(first + count)


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, batch=st.integers(1, 4), first=st.integers(0, 10**12), count=st.integers(1, 500))
def test_a_place_of_a_source_knows_the_slot_that_reads_it(
    weights: dict[str, float], batch: int, first: int, count: int
) -> None:
    mixture, samples = Mixture.of(weights, batch), np.arange(first, first + count)
    sources, positions = mixture.positions(samples)
    for source in range(len(weights)):
        here = sources == source
        assert np.array_equal(mixture.samples(source, positions[here]), samples[here])


@settings(max_examples=20, deadline=None)
@given(
    totals=st.lists(st.integers(8, 60), min_size=2, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_each_source_is_read_to_its_end_before_any_of_it_again_and_in_another_order(
    totals: list[int], seed: int, data: st.DataObject
) -> None:
    weights = {name: data.draw(st.integers(1, 5)) for name in "abcd"[: len(totals)]}
    mixture = Mixture.of(weights, 1)
    order = mixture.order(totals, seed)
    cut = data.draw(st.integers(0, 250))
    read = np.concatenate([order(0, cut), order(cut, 250 - cut)]).astype(
        int
    )  # however it is cut into batches
    firsts = np.cumsum([0, *totals])
    for first, total in zip(firsts, totals, strict=False):
        own = read[(read >= first) & (read < first + total)] - first
        epochs = [own[start : start + total] for start in range(0, len(own), total)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        if total > 20 and len(epochs) > 2:
            assert not np.array_equal(epochs[0], epochs[1])
    assert (read < sum(totals)).all()


def test_the_order_of_a_mixture_never_changes_between_versions() -> None:
    """Golden values: a change here means that a resumed training reads other text than it began with."""
    mixture = Mixture.of({"web": 5, "books": 3, "code": 2}, 2)
    assert mixture == Mixture(("web", "books", "code"), (1000, 600, 400))
    sources, positions = mixture.positions(np.arange(1995, 2005))
    assert sources.tolist() == [0, 1, 0, 1, 0, 2, 0, 1, 0, 2]
    assert positions.tolist() == [997, 598, 998, 599, 999, 400, 1000, 600, 1001, 401]
    assert mixture.order([50, 7, 20], seed=1)(3, 10).tolist() == [23, 74, 31, 56, 3, 52, 49, 60, 13, 53]


def test_the_order_of_the_weights_and_their_sum_do_not_matter() -> None:
    one = Mixture.of({"a": 1, "b": 3, "c": 1}, 2)
    assert one == Mixture.of({"c": 0.5, "b": 1.5, "a": 0.5}, 2)
    assert (
        one.order([5, 6, 7], 0)(0, 30).tolist()
        == Mixture.of({"b": 3, "c": 1, "a": 1}, 2).order([5, 6, 7], 0)(0, 30).tolist()
    )


def test_one_source_alone_gets_every_slot() -> None:
    sources, positions = Mixture.of({"a": 0.3}, 3).positions(np.arange(5000))
    assert not sources.any()
    assert np.array_equal(positions, np.arange(5000))


def test_a_weight_that_never_comes_to_a_window_is_refused() -> None:
    assert Mixture.of({"large": 1, "small": 0.0006}, 1).counts == (999, 1)
    with pytest.raises(ValueError, match="weight of small gives not one sequence in 1,000 steps"):
        Mixture.of({"large": 1, "small": 0.0004}, 1)
    with pytest.raises(ValueError, match="can't share out"):
        Mixture.of({"a": 1}, 3_000_001)


def config(context: int = 32, **fields: Any) -> PretrainConfig:
    model = {"layers": 1, "heads": 2, "width": 16, "context": context}
    return PretrainConfig.model_validate(
        {
            "model": model,
            "tokens": 64 * context * 10,
            "batch_tokens": 10 * context,
            "precision": "fp32",
            **fields,
        }
    )


def prepared(given: PretrainConfig, corpus: dict[str, Path], out: Path) -> tuple[Job, list[str]]:
    context = LocalContext()
    return prepare(given, corpus, out, context), context.notes


def test_a_step_reads_its_share_of_each_source_and_the_notes_say_how_often_each_is_read(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    job, notes = prepared(config(mixture={"stdlib": 3, "email": 2}), corpus, tmp_path)
    sequences = job.corpus.sequences("train")
    order = job.corpus.order(sequences.counts)
    texts: dict[str, list[int]] = {"stdlib": [], "email": []}
    for batch in TokenShards(corpus["tokens"], "train"):
        for row, name in enumerate(batch.ids):
            texts[name.split("/")[0]] += batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].tolist()
    known = {
        name: {tuple(text[start : start + 32]) for start in range(0, len(text) - 32, 32)}
        for name, text in texts.items()
    }
    assert not known["stdlib"] & known["email"]
    for step in range(64):
        rows = sequences.take(order(*job.config.step_samples(step))).tokens_BT.tolist()
        sources = ["stdlib" if tuple(row) in known["stdlib"] else "email" for row in rows]
        assert all(tuple(row) in known[source] for row, source in zip(rows, sources, strict=True))
        assert sources.count("stdlib") == 6
    reading = {row["source"]: row for row in json.loads((tmp_path / "sources.json").read_text())}
    for name, read in (("stdlib", 384), ("email", 256)):
        assert (reading[name]["windows"], reading[name]["read"]) == ((len(texts[name]) - 1) // 32, read)
        assert (
            f"- {name}: {read / 640:.1%} of the windows, {read / reading[name]['windows']:.2f} epochs"
            in notes
        )


def test_sources_that_are_not_named_are_left_out_with_a_word(corpus: dict[str, Path], tmp_path: Path) -> None:
    job, notes = prepared(config(mixture={"stdlib": 1}), corpus, tmp_path)
    tokens = TokenShards(corpus["tokens"], "train").tokens - len(job.corpus.streams("train")[0])
    assert f"pretrain.mixture leaves out email ({tokens:,} tokens)" in notes
    job, again = prepared(config(mixture={"stdlib": 1}), corpus, tmp_path)  # after a kill
    assert again == notes


def test_a_source_that_does_not_exist_is_refused_with_those_that_do(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"names wiki, but no .*\nthe sources are email, stdlib"):
        prepared(config(mixture={"wiki": 1, "email": 1}), corpus, tmp_path)


def test_a_source_without_a_whole_window_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"source email of pretrain.mixture has [\d,]+ training tokens, less than one"
    ):
        prepared(config(context=12_000, mixture={"stdlib": 1, "email": 1}), corpus, tmp_path)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "much"])
def test_a_weight_that_is_no_positive_number_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"mixture\.email"):
        config(mixture={"email": weight})


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="mixture"):
        config(mixture={})
