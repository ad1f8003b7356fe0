from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose, read_documents, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.core.processes import process_pool
from data_pipeline.dedup.spans import SpanRules, SpanTally, cut_repeats
from data_pipeline.documents import hash_ids
from data_pipeline.stage import LocalContext, Metrics, StageContext

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where hundreds of tiny corpora don't wait for the disk."""
Place = tuple[str, int]
"""A word: id of its document, and number."""


class Pooled(LocalContext):
    """One pool of processes for all maps: starting a pool for each takes a test's time."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        super().__init__(workers)
        self._pool = pool

    def map(self, fn: Callable, items: Sequence, *, names: Sequence[str] | None = None) -> list:
        return list(self._pool.map(fn, items))


def run(
    texts: Any,
    folder: Path,
    shards: int = 3,
    context: StageContext | None = None,
    memory_mb: int = 100,
    **rules: int,
) -> SpanTally:
    source = write_documents(folder / "in", texts, shards)
    paths = sorted(source.glob("documents-*"))
    out = folder / "out"
    return cut_repeats(SpanRules(**rules), paths, out / "scratch", out, context or LocalContext(), memory_mb)


def cuts(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``cut.parquet``, sorted."""
    rows = pq.read_table(folder / "out" / "cut.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["id"], row["start"]))


def words_of(text: str) -> list[tuple[int, str]]:
    """Where each word begins, and its characters but white space, by another way than the kernel's."""
    words: list[tuple[int, str]] = []
    in_letters = False
    for at, character in enumerate(text):
        ideograph = "CJK UNIFIED" in unicodedata.name(character, "")
        letter = (unicodedata.category(character)[0] in "LMN" or character == "_") and not ideograph
        if ideograph or (letter and not in_letters):
            words.append((at, ""))
        in_letters = letter
        if words and not character.isspace():
            words[-1] = (words[-1][0], words[-1][1] + character)
    return words


class Checked:
    """A small corpus before and after cutting, compared with all pairs of windows by brute force."""

    def __init__(
        self, texts: Mapping[str, str], width: int, left: int, folder: Path, shards: int = 2
    ) -> None:
        self.width, self.left = width, left
        self.tally = run(texts, folder, shards, min_words=width, min_remaining_words=left)
        self.texts, self.out, self.rows = texts, read_documents(folder / "out"), cuts(folder)
        self.words = {id: words_of(text) for id, text in texts.items()}
        self.cut = {
            (row["id"], number)
            for row in self.rows
            for number, (at, _) in enumerate(self.words[row["id"]])
            if row["start"] <= at < row["end"]
        }
        hashes = dict(zip(texts, hash_ids(texts, "spans").tolist(), strict=True))
        self.first: dict[tuple[str, ...], Place] = {}
        self.all: dict[Place, tuple[str, ...]] = {}
        times: dict[tuple[str, ...], int] = {}
        for id in sorted(texts, key=lambda id: hashes[id]):
            for place in range(len(self.words[id]) - width + 1):
                window = tuple(word for _, word in self.words[id][place : place + width])
                self.first.setdefault(window, (id, place))
                self.all[id, place] = window
                times[window] = times.get(window, 0) + 1
        self.kept = {place for window, place in self.first.items() if times[window] > 1}
        self.repeated = {place for place, window in self.all.items() if self.first[window] != place}

    def covered(self, windows: set[Place]) -> set[Place]:
        return {(id, place + offset) for id, place in windows for offset in range(self.width)}

    def whole(self, window: Place) -> bool:
        return window[0] in self.out and not self.covered({window}) & self.cut

    def is_left(self, word: Place) -> bool:
        """Whether a word stands in what came out, or else its counterpart in an earlier equal window."""
        id, number = word
        if word not in self.cut:
            return id in self.out
        windows = [(id, at) for at in range(number - self.width + 1, number + 1) if (id, at) in self.repeated]
        earlier = [(at, self.first[self.all[id, at]]) for _, at in windows]
        return any(self.is_left((first[0], first[1] + number - at)) for at, first in earlier)

    def check(self) -> None:
        self.check_texts()
        # 1. What is cut is in a repeated window, and left elsewhere; what only such windows have is cut.
        repeated, kept = self.covered(self.repeated), self.covered(self.kept)
        assert repeated - kept <= self.cut <= repeated
        assert all(self.is_left(word) for word in self.cut)
        # 2. No two windows left whole are equal.
        whole = [self.all[window] for window in self.all if self.whole(window)]
        assert len(whole) == len(set(whole))
        # 3. Windows that occur several times are left whole, but where a repeated one would be whole between them.
        broken = {window for window in self.kept if not self.whole(window)}
        assert (self.tally.kept, self.tally.broken) == (len(self.kept), len(broken))
        between = self.covered({window for window in self.repeated if self.covered({window}) <= kept})
        assert all(self.covered({window}) & self.cut <= between for window in broken)
        self.check_dropped()
        self.check_rows()

    def check_texts(self) -> None:
        """What comes out are the words that were not cut, with the punctuation that they had."""
        for id, text in self.out.items():
            words = self.words[id]
            kept = [word for number, (_, word) in enumerate(words) if (id, number) not in self.cut]
            before = self.texts[id][: words[0][0]] if words else self.texts[id]
            assert "".join(text.split()) == "".join([*before.split(), *kept])
            assert [word for _, word in words_of(text)] == kept
            if len(kept) == len(words):
                assert text == self.texts[id]

    def check_dropped(self) -> None:
        touched = {id for id, _ in self.cut}
        counts = {
            id: sum((id, number) not in self.cut for number in range(len(self.words[id]))) for id in touched
        }
        keeps = {id for id, _ in self.kept}
        assert set(self.texts) - set(self.out) == {id for id in touched - keeps if counts[id] < self.left}

    def check_rows(self) -> None:
        for row in self.rows:
            numbers = [
                n for n, (at, _) in enumerate(self.words[row["id"]]) if row["start"] <= at < row["end"]
            ]
            assert len(numbers) == row["words"] > 0
            near = range(numbers[0] - self.width + 1, numbers[-1] + 1)
            windows = [(row["id"], at) for at in near if (row["id"], at) in self.repeated]
            assert set(row["kept_in"]) == {self.first[self.all[window]][0] for window in windows}
            assert row["dropped"] == (row["id"] not in self.out)
            assert row["excerpt"] == " ".join(self.texts[row["id"]][row["start"] : row["end"]].split())[:160]


PIECES = st.sampled_from(
    ["a", "b", "a b c d e", "b c d e f g", "x, y. (z)", "É東京", "\n\n", "...", "a b a b a b"]
)
TEXTS = st.lists(
    st.lists(st.tuples(PIECES, st.sampled_from([" ", "\n", ""])), max_size=14).map(
        lambda pieces: "".join(piece + space for piece, space in pieces)
    ),
    max_size=7,
)


@given(TEXTS, st.integers(2, 6), st.integers(1, 12), st.integers(1, 3))
@settings(deadline=None, max_examples=120)
def test_the_law_holds_on_any_small_corpus(texts: list[str], width: int, left: int, shards: int) -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        named = {f"s/{number}": text for number, text in enumerate(texts)}
        Checked(named, width, left, Path(folder), shards).check()


def own(number: int, words: int) -> str:
    """Text that begins and ends with words of its own."""
    return f"Begin{number} {prose(number, words)} End{number}."


def boilerplate() -> dict[str, str]:
    """Thirty texts of their own; a licence before, within or after most, a poem in three, some twice in one text."""
    licence, poem = own(900, 90), own(901, 70)
    texts = {}
    for n in range(30):
        one, other = own(n, 100), own(100 + n, 60)
        parts = [licence] * (n % 4 > 0) + [one] + [poem] * (n % 10 == 0) + [other] + [licence] * (n % 7 == 0)
        texts[f"{'ab'[n % 2]}/{n:02d}"] = "\n\n".join(parts)
    return texts | {"c/all": licence, "c/more": f"Not long. {licence}", "c/poem": f"{poem}\n", "c/none": "?!"}


def test_a_licence_in_many_documents_stays_in_one_and_all_else_stays_everywhere(tmp_path: Path) -> None:
    texts = boilerplate()
    checked = Checked(texts, 50, 20, tmp_path)
    checked.check()
    for text in (own(900, 90), own(901, 70)):
        assert sum(text in one for one in checked.out.values()) == 1
    for n in range(30):
        text = checked.out[f"{'ab'[n % 2]}/{n:02d}"]
        assert own(n, 100) in text
        assert own(100 + n, 60) in text
    assert not {"c/all", "c/more", "c/poem"} <= set(checked.out)
    assert checked.out["c/none"] == "?!"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("One own line\n[a b c d e.]\nand another", "One own line\nand another"),
        ("if x:\n    [a b c d e]\n    y = 1", "if x:\n    y = 1"),
        ("first\n\n[a b c d e] and the rest", "first\n\nand the rest"),
        ("first [a b c d e.]\n\nthe rest", "first\n\nthe rest"),
        ("first [a b c d e,(]rest)", "first rest)"),
        ("([a b c d e) (]rest)", "( rest)"),
        ("end.\n[a b c d e.]\n", "end.\n"),
        ("\n  [a b c d e]\nend", "\n  end"),
        ("x東[a b c d e 京]y", "x東 y"),
    ],
)
def test_words_and_lines_stay_apart_where_a_span_was_cut(before: str, after: str, tmp_path: Path) -> None:
    keeper, other = sorted(["s/1", "s/2"], key=lambda id: int(hash_ids([id], "spans")[0]))
    span = before[before.index("[") + 1 : before.index("]")]
    texts = {keeper: f"{span} z", other: before.replace("[", "").replace("]", "")}
    run(texts, tmp_path, min_words=5, min_remaining_words=1)
    assert read_documents(tmp_path / "out") == {keeper: texts[keeper], other: after}
    assert [row["kept_in"] for row in cuts(tmp_path)] == [[keeper]]


def test_of_a_text_that_repeats_itself_one_window_of_each_kind_stays(tmp_path: Path) -> None:
    """Kept are the first windows of both kinds, "a b a ..." and "b a b ...": 51 words. Of 52 words only the first
    window occurs twice, and 50 are kept. What is no word stays.
    """
    short = {f"t/{n}": f"c{n} d{n} " * 26 for n in range(8)}
    run({"s/1": "a b " * 5000, "s/2": "=" * 5000, "s/3": "-=" * 50 + " x" * 49} | short, tmp_path)
    out = read_documents(tmp_path / "out")
    assert out["s/1"].split() == ("a b " * 26).split()[:51]
    assert {id: out[id].split() for id in short} == {id: text.split()[:50] for id, text in short.items()}
    assert out["s/2"] == "=" * 5000
    assert out["s/3"] == "-=" * 50 + " x" * 49


def test_case_and_punctuation_make_a_difference_and_white_space_does_not(tmp_path: Path) -> None:
    base = prose(5, 60)
    variants = {"wide": base.replace(" ", "\n\t "), "upper": base.upper(), "comma": base.replace(" ", ", ")}
    for name, text in variants.items():
        tally = run({"s/base": base, "s/other": text}, tmp_path / name, min_remaining_words=1)
        assert (tally.total("dropped_documents") == 1) == (name == "wide"), name
        assert (tally.bytes_cut > 0) == (name == "wide"), name


def test_worker_count_and_memory_change_no_byte(tmp_path: Path) -> None:
    texts = boilerplate() | {f"d/{n}": prose(7, 9000) for n in range(3)}
    with process_pool(4) as pool:
        tallies = [
            run(texts, tmp_path / "one"),
            run(texts, tmp_path / "four", context=Pooled(pool, 4)),
            run(texts, tmp_path / "little", memory_mb=1),
        ]
    assert len(list((tmp_path / "little" / "out" / "scratch").glob("windows-answers-*"))) > 2
    sealed = [digests(tmp_path / name / "out") for name in ("one", "four", "little")]
    assert sealed[0] == sealed[1] == sealed[2]
    assert tallies[0] == tallies[1] == tallies[2]
    assert tallies[0].report() == tallies[1].report()


def test_how_documents_lie_in_shards_does_not_change_what_is_cut(tmp_path: Path) -> None:
    items = list(boilerplate().items())
    one = run(items, tmp_path / "a", shards=1)
    random.Random(1).shuffle(items)
    other = run(items, tmp_path / "b", shards=7)
    assert read_documents(tmp_path / "a" / "out") == read_documents(tmp_path / "b" / "out")
    assert cuts(tmp_path / "a") == cuts(tmp_path / "b")
    assert one == other
    assert one.report() == other.report()


def test_a_killed_cut_ends_the_same_when_started_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", boilerplate())

    def body(rules: Any, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
        tally = cut_repeats(
            rules, sorted(inputs["in"].glob("documents-*")), out / "scratch", out, context, memory_mb=100
        )
        return {"spans": tally.total("spans"), "bytes": tally.bytes_cut, "broken": tally.broken}

    check_restarts(body, SpanRules(), {"in": source}, tmp_path)


def test_the_report_counts_by_source_and_shows_what_was_cut(tmp_path: Path) -> None:
    tally = run(boilerplate(), tmp_path)
    report = tally.report()
    rows = cuts(tmp_path)
    assert tally.total("documents") == len(boilerplate())
    assert tally.total("spans") == len(rows)
    assert tally.total("words") == sum(row["words"] for row in rows)
    gone = set(boilerplate()) - set(read_documents(tmp_path / "out"))
    assert tally.total("dropped_documents") == len(gone)
    out_bytes = sum(len(text.encode()) for text in read_documents(tmp_path / "out").values())
    assert tally.total("bytes_out") == out_bytes
    times, most = tally.frequent[0]
    licence = [row for row in rows if row["excerpt"] == most["excerpt"]]
    assert times == len(licence) > 20
    assert f"| {times} | 92 | {most['kept_in'][0]} |" in report
    assert [one["words"] for one in tally.longest] == sorted((row["words"] for row in rows), reverse=True)[
        :10
    ]
    assert "| b | 15 |" in report


def test_empty_shards_and_corpora_without_repeats_pass_unchanged(tmp_path: Path) -> None:
    texts = {"a/1": prose(1), "a/2": "", "a/3": "..."}
    tally = run(texts, tmp_path, shards=5)
    assert read_documents(tmp_path / "out") == texts
    assert len(list((tmp_path / "out").glob("documents-*"))) == 5
    assert cuts(tmp_path) == []
    assert tally.bytes_cut == 0
    assert "Most often" not in tally.report()


def thue_morse(words: int, zero: str, one: str) -> str:
    """Words in the order in which a polynomial modulo a power of two tells them from their complement worst."""
    return " ".join((zero, one)[number.bit_count() % 2] for number in range(words))


def test_the_longest_windows_of_two_words_have_hashes_of_their_own(tmp_path: Path) -> None:
    """Each text stands twice, so that all their windows are compared."""
    texts = {}
    for n in range(100):
        for side, order in enumerate(((f"a{n}", f"b{n}"), (f"b{n}", f"a{n}"))):
            texts |= {f"s/{n}/{side}/{copy}": thue_morse(256, *order) for copy in "ab"}
    run(texts, tmp_path, min_words=256)
    assert sorted(read_documents(tmp_path / "out").values()) == sorted(set(texts.values()))


def test_windows_are_neither_single_words_nor_longer_than_their_hash_is_sound() -> None:
    for words in (1, 257):
        with pytest.raises(ValidationError, match="min_words"):
            SpanRules(min_words=words)
