"""Where one of two models is better: by class of bytes, length, document and character; and how it is shown."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.color import ColorSystem
from tokenizers import Tokenizer, models

from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT
from flows.compare.compare import Comparison, compare
from flows.compare.find_where import MOST_DOCUMENTS, MOST_ITEMS, TOKENS
from flows.compare.heat import MOST_CHARACTERS
from flows.compare.log import files as logged
from flows.compare.page import page
from flows.compare.show import show
from flows.compare.subjects import Subject, label, sealed_line
from flows.compare.where import OnSet, OnTask, Place, most_of
from flows.engine.store import Artifact, Store
from flows.listeners.terminal import Screen
from llm.evaluate.config import EvaluateConfig
from llm.score.classes import CLASSES, character_classes
from llm.score.fixed import Fixed
from llm.score.sets import TOKENS as COLUMNS

HOSTILE = "</pre><script>alert(1)</script> [red] &amp; \x1b]0;title\x07 نص عربي ‮ 12"
TEXTS: list[str] = [
    *json.loads((Path(__file__).parents[1] / "ordinary_texts.json").read_text("utf-8")).values(),
    "def f(x):\r\n    return {x: 1.5e3}  # see https://example.com/a?b=1.\r\n",
    "👩‍👩‍👧‍👦 1️⃣ हिन्दी में ภาษาไทย नमस्ते ١٢٣",
    HOSTILE,
    "x",
    "1984 and 2001, or 42 " * 20,
]
QUIZ: list[dict[str, Any]] = [
    {"query": f"{HOSTILE}\nnumber {n}?", "choices": ["да", "いいえ"], "gold": 0} for n in range(130)
]
Cut = list[tuple[int, float]]
"""Bytes and nats of each token."""
Make = Callable[..., Subject]


def cut(text: str, seed: int, digits: float) -> Cut:
    """Cut a text into pieces of 1 to 6 bytes; those with a digit in them cost ``digits`` nats a byte more."""
    generator, data = np.random.default_rng([seed, len(text)]), text.encode()
    ends = [0, *np.unique(np.minimum(generator.integers(1, 7, len(data)).cumsum(), len(data))).tolist()]
    return [
        (end - start, float(generator.gamma(2, 0.3) * (end - start) + digits * len(data[start:end])
                            * any(byte in b"0123456789" for byte in data[start:end])))
        for start, end in pairwise(ends)
    ]  # fmt: skip


def rows_of(cuts: list[Cut | None]) -> list[dict[str, Any]]:
    """Rows of a set with all columns."""
    rows = []
    for number, (text, tokens) in enumerate(zip(TEXTS, cuts, strict=True), 1):
        nats = math.fsum(np.float32(one) for _, one in tokens) if tokens else 5.0 * number
        length = len(text.encode())
        rows.append(
            {"set": "mixed", "id": f"mixed/{number}", "bytes": length, "tokens": 1, "text_nats": nats,
             "bits_per_byte": nats / math.log(2) / length, "sliding_nats": None, "as_it_is": tokens is not None,
             "text": text, "token_bytes": [size for size, _ in tokens] if tokens else None,
             "token_nats": [one for _, one in tokens] if tokens else None}
        )  # fmt: skip
    return rows


def item(number: int, right: bool, kept: bool) -> dict[str, Any]:
    chosen = 0 if right else 1
    texts = {"question": QUIZ[number]["query"], "options": QUIZ[number]["choices"]} if kept else {}
    return {
        "task": "quiz", "item": number, "gold": 0, "right": right, "cut": 0, "tokens": [1, 1], "bytes": [4, 9],
        "nats": [1.0 + number * right, 9.0], **{f"chosen_by_{rule}": chosen for rule in ("mean", "sum", "bytes")},
    } | texts  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Make:
    """``model(cuts, ...)``: seal a model and its evaluation on the set ``mixed`` and the task ``quiz``."""
    store, made = Store(tmp_path / "home"), list[Subject]()
    for name, rows in (("mixed", [{"text": text} for text in TEXTS]), ("quiz", QUIZ)):
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")

    def seal(stage: str, write: Callable[[Path], None], **fields: Any) -> Artifact:
        name = f"{stage[:1].encode().hex()}{len(made):02x}"
        folder, _ = store.begin(stage, name, {})
        write(folder)
        inputs = {
            type_: {"stage": one.stage, "fingerprint": one.fingerprint, "payload_sha256": one.payload_sha256}
            for type_, one in fields.pop("inputs", {}).items()
        }
        shared = {"version": 1, "config": {}, "metrics": {}, "finished": "2026-01-01", "seconds": 1.0}
        return store.seal(stage, name, shared | {"recipe": "r", "inputs": inputs} | fields)

    def write_model(folder: Path) -> None:
        write_text(folder / "model.json", "{}")
        write_text(folder / "model.safetensors", str(len(made)))

    def evaluated(
        cuts: list[Cut | None], right: Callable[[int], bool] = lambda number: True, *,
        kept: bool = True, upload_texts: bool = True,
    ) -> Subject:  # fmt: skip
        tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "x": 1}, unk_token="x")).to_str()
        inputs = {
            "tokenizer": seal("train_tokenizer", lambda to: write_text(to / "tokenizer.json", tokenizer)),
            "model": seal("pretrain", write_model),
        }  # fmt: skip
        config = EvaluateConfig.model_validate({
            "sets": [{"name": "mixed", "path": tmp_path / "mixed.jsonl"}],
            "tasks": [{"name": "quiz", "path": tmp_path / "quiz.jsonl", "kind": "choice"}],
        }).resolve()  # fmt: skip
        rows = rows_of(cuts)
        table = pa.Table.from_pylist(rows, COLUMNS)
        found = Fixed({"mixed": rows}, {"quiz": [item(n, right(n), kept) for n in range(len(QUIZ))]},
                      [table] if kept else [])  # fmt: skip

        def write(folder: Path) -> None:
            found.write(folder)
            documents = [
                {"id": f"a/{place}", "bytes": 9, "text_nats": 5.0 + len(made)} for place in range(12)
            ]
            pq.write_table(pa.Table.from_pylist(documents), folder / "documents.parquet")

        evaluation = seal(
            "evaluate", write, inputs=inputs, config=config.identity(),
            metrics={"bits_per_byte": 1.0} | found.metrics(), recipe_runtime={"upload_texts": upload_texts},
        )  # fmt: skip
        made.append(Subject(label(len(made)), f"run {len(made)}", sealed_line(store, evaluation)))
        return made[-1]

    return evaluated


def write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def cuts_of(seed: int, digits: float = 0.0) -> list[Cut | None]:
    return [cut(text, seed, digits) for text in TEXTS]


def on_set(comparison: Comparison) -> OnSet:
    json.dumps(comparison.as_json(), allow_nan=False)
    [found] = [one for one in comparison.where if isinstance(one, OnSet)]
    return found


def on_task(comparison: Comparison) -> OnTask:
    [found] = [one for one in comparison.where if isinstance(one, OnTask)]
    return found


def printed(comparison: Comparison, columns: int = 80, *, terminal: bool = False) -> str:
    screen = Screen()
    screen.width, screen._color_system = columns, ColorSystem.TRUECOLOR if terminal else None
    screen.file = out = io.StringIO()
    show(comparison, screen)
    return out.getvalue()


def by_byte(cuts: list[Cut | None]) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes and bits of each class, a byte at a time."""
    sizes, bits = Counter[str](), dict.fromkeys(CLASSES, 0.0)
    for text, tokens in zip(TEXTS, cuts, strict=True):
        classes = [
            CLASSES[one]
            for one, letter in zip(character_classes(text), text, strict=True)
            for _ in letter.encode()
        ]
        place = 0
        for size, nats in tokens or []:
            for name in classes[place : place + size]:
                sizes[name] += 1
                bits[name] += float(np.float32(nats)) / math.log(2) / size
            place += size
    return sizes, bits


def test_classes_have_the_bits_of_their_bytes_and_sum_to_the_set(model: Make) -> None:
    cuts = cuts_of(1), cuts_of(2)
    comparison = compare([model(one) for one in cuts])
    found = on_set(comparison)
    assert {part.name for part in found.classes} == set(CLASSES)
    for place, one in enumerate(cuts):
        sizes, bits = by_byte(one)
        assert {part.name: part.bytes for part in found.classes} == sizes
        assert {part.name: part.bits[place] for part in found.classes} == pytest.approx(bits)
    values = [subject.evaluation.metrics["mixed/bits_per_byte"] for subject in comparison.subjects]
    whole = sum(len(text.encode()) for text in TEXTS)
    for parts in (found.classes, found.lengths):
        assert sum(part.bytes for part in parts) == whole
        for place, value in enumerate(values):
            assert math.fsum(part.bits[place] for part in parts) / whole == pytest.approx(value, rel=1e-12)
        assert sum(part.adds for part in parts) == pytest.approx(values[1] - values[0])
    assert sum(part.documents or 0 for part in found.lengths) == len(TEXTS)
    assert not found.notes


def test_lengths_are_quartiles_whose_bounds_are_shown(model: Make) -> None:
    found = on_set(compare([model(cuts_of(1)), model(cuts_of(2))]))
    sizes = sorted(len(text.encode()) for text in TEXTS)
    ends = np.quantile(sizes, (0.25, 0.5, 0.75), method="lower").tolist()
    assert [part.documents for part in found.lengths] == [
        sum(low < size <= high for size in sizes) for low, high in pairwise([0, *ends, sizes[-1]])
    ]
    assert found.lengths[0].name == f"{sizes[0]:,} to {ends[0]:,} bytes"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_model_that_is_worse_on_digits_alone_is_shown_to_be_worse_on_numbers(
    model: Make, swapped: bool
) -> None:
    better, worse = model(cuts_of(1)), model(cuts_of(1, digits=3.0))
    comparison = compare([worse, better] if swapped else [better, worse])
    found, sign = on_set(comparison), -1 if swapped else 1
    numbers = found.classes[0]
    assert numbers.name == "numbers", "it adds most, and comes first"
    assert sign * numbers.difference > 3
    assert all(abs(part.difference) < abs(numbers.difference) for part in found.classes[1:])
    assert sum(part.adds for part in found.classes[1:]) < sign * numbers.adds
    first = found.documents[0]
    assert (first.number, sign * first.more > 0) == (len(TEXTS), True), "years and numbers again and again"
    assert first.whole
    digits = np.array([letter.isdigit() for letter in first.whole.text])
    assert abs(first.whole.more[digits]).min() > 3
    assert abs(first.whole.more).sum() == pytest.approx(abs(first.more))
    line = next(line for line in printed(comparison).splitlines() if line.startswith("numbers "))
    assert f"{numbers.difference:+.4f}" in line


def test_documents_that_differ_most_come_first_whoever_needs_more(model: Make) -> None:
    cuts = cuts_of(1), cuts_of(2)
    found = on_set(compare([model(one) for one in cuts])).documents
    more = [
        (sum(nats for _, nats in second or []) - sum(nats for _, nats in first or [])) / math.log(2)
        for first, second in zip(*cuts, strict=True)
    ]
    order = sorted(range(len(TEXTS)), key=lambda place: -abs(more[place]))[:MOST_DOCUMENTS]
    assert [one.number - 1 for one in found] == order
    assert [one.more for one in found] == pytest.approx([more[place] for place in order], abs=1e-4)
    assert {one.more > 0 for one in found} == {True, False}
    for one in found:
        assert one.whole
        assert one.whole.text == TEXTS[one.number - 1]
        assert one.whole.more.sum() == pytest.approx(one.more, abs=1e-4)


def test_the_place_that_differs_most_begins_at_no_mark() -> None:
    text = "a" * 20 + "e\u0301\u0301" + "b" * 20
    more = np.zeros(len(text))
    more[22] = 5.0
    more[21] = -1.0
    found = most_of(Place(text, more, start=0, of=len(text)), 4, 1)
    assert (found.start, found.text[:3]) == (20, "e\u0301\u0301")
    assert most_of(Place(text, more, start=0, of=len(text)), 4, -1).more.min() == -1
    assert most_of(Place(text, more, start=0, of=len(text)), 99, 1).text == text


def test_texts_that_a_tokenizer_changes_are_in_no_class_and_that_is_said(model: Make) -> None:
    changed = cuts_of(2)
    changed[0] = changed[-1] = None
    comparison = compare([model(cuts_of(1)), model(changed)])
    found = on_set(comparison)
    assert found.notes == [f"2 of {len(TEXTS)} documents are in no class: a tokenizer changes their text"]
    size = sum(len(text.encode()) for text in TEXTS[1:-1])
    assert sum(part.bytes for part in found.classes) == size
    assert sum(part.documents or 0 for part in found.lengths) == len(TEXTS)
    assert {one.number for one in found.documents if one.whole is None} == {1, len(TEXTS)}
    assert found.notes[0] in " ".join(printed(comparison).split())
    assert found.notes[0] in page(comparison)


def test_scores_of_an_earlier_version_are_compared_and_what_is_not_known_is_said(model: Make) -> None:
    old, new = model(cuts_of(1), kept=False), model(cuts_of(2), lambda number: number > 0)
    assert not (old.evaluation.path / TOKENS).exists()
    comparison = compare([old, new])
    found = on_set(comparison)
    assert not found.classes
    assert found.lengths
    assert [one.whole for one in found.documents] == [None] * MOST_DOCUMENTS
    assert "not known, for the scores of A were made by an earlier version" in found.notes[0]
    assert on_task(comparison).items[0].question == QUIZ[0]["query"], "the other one kept it"
    older = compare([old, model(cuts_of(3), lambda number: number > 0, kept=False)])
    assert "which did not keep them" in on_task(older).notes[0]
    for shown in (" ".join(printed(comparison).split()), page(comparison)):
        assert found.notes[0] in shown


def test_items_that_one_alone_got_right_are_listed(model: Make) -> None:
    first, second = model(cuts_of(1), lambda n: n % 2 == 0), model(cuts_of(2), lambda n: n % 3 == 0)
    comparison = compare([first, second])
    found = on_task(comparison)
    differ = [number for number in range(len(QUIZ)) if (number % 2 == 0) != (number % 3 == 0)]
    assert found.only_first == sum(number % 2 == 0 for number in differ)
    assert found.only_second == len(differ) - found.only_first
    assert [one.number for one in found.items] == differ[::-1][:MOST_ITEMS], "those whose answers differ most"
    assert found.notes == [f"{MOST_ITEMS} of {len(differ)} such items, whose right answers' bits differ most"]
    one = found.items[0]
    assert one.chosen == tuple(0 if right else 1 for right in one.right)
    shown = printed(comparison)
    only = "A" if one.right[0] else "B"
    other = "B" if only == "A" else "A"
    assert f"item {one.number}: only {only} got it right" in shown
    assert f"✓ да  ({only} chose it)" in shown
    assert f"· いいえ  ({other} chose it)" in shown


class Reader(HTMLParser):
    """Collects tags, and the text of the boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.boxes, self._inside = Counter[str](), list[str](), False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag == "pre":
            self._inside = True
            self.boxes.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.boxes[-1] += data


def test_hostile_texts_of_any_script_stand_whole_on_the_page_and_obey_nobody(model: Make) -> None:
    comparison = compare([model(cuts_of(1)), model(cuts_of(2), lambda number: number > 2)])
    reader = Reader()
    reader.feed(html := page(comparison))
    assert not reader.tags["script"]
    assert "src=" not in html
    assert 'dir="auto"' in html
    texts = [box.removeprefix("\n") for box in reader.boxes]
    for one in on_set(comparison).documents:
        text = TEXTS[one.number - 1].replace("\r", "␍").replace("\x1b", "␛").replace("\x07", "␇")
        assert text in texts
    assert any(QUIZ[2]["query"].partition("\x1b")[0] in text for text in texts)
    for columns in (80, 200):
        lines = printed(comparison, columns).splitlines()
        assert max(Screen().render_str(line).cell_len for line in lines) <= columns
        assert not any("\x1b" in line for line in lines)
    assert "\x1b[" in printed(comparison, terminal=True)


def test_a_long_text_is_cut_to_where_it_differs_most_and_that_is_said(
    model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "ab 12 " * 4000
    monkeypatch.setitem(globals(), "TEXTS", [*TEXTS[:11], long])
    first, second = cuts_of(1), cuts_of(2)
    assert second[-1]
    second[-1][-1] = (second[-1][-1][0], 9000.0)
    comparison = compare([model(first), model(second)])
    reader = Reader()
    reader.feed(html := page(comparison))
    start = len(long) - MOST_CHARACTERS
    assert f"characters {start + 1:,} to {len(long):,} of {len(long):,}" in html
    assert reader.boxes[0] == "\n" + long[start:]
    assert "characters " in printed(comparison)
    place = on_set(comparison).documents[0].as_json()["place"]
    assert place["end"] == len(long)
    assert place["text"] == long[place["start"] :]


def test_where_texts_are_withheld_from_mlflow_none_is_in_what_is_logged(model: Make) -> None:
    subjects = [model(cuts_of(1)), model(cuts_of(2), lambda number: number > 0, upload_texts=False)]
    comparison = compare(subjects)
    for text in logged(comparison).values():
        assert "mixed: by class of bytes" in text or '"classes"' in text
        assert "alert(1)" not in text
        assert "upload_texts is false" in text
    assert "alert(1)" in page(comparison)


def test_of_more_than_two_models_or_of_one_nothing_is_said(model: Make) -> None:
    one, two, three = (model(cuts_of(seed)) for seed in (1, 2, 3))
    assert compare([one, two, three]).where == []
    assert compare([one, one]).where == []
    assert "nothing of it is tested" not in page(compare([one, two, three]))
    assert "nothing of it is tested" in page(compare([one, two]))
