"""One definition of a word by script, and all that goes by it."""

from __future__ import annotations

import importlib.util
import os
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_words import plain_words

from data_pipeline.clean.sequences import Sequences
from data_pipeline.core.words import (
    IGNORED,
    MARK,
    TABLE_SIZE,
    UNSPACED,
    character_classes,
    next_word,
    words_of,
)
from data_pipeline.dedup.minhash import shingle_sets
from data_pipeline.dedup.span_kernels import classes, read_words
from data_pipeline.documents import buffers

SENTENCES = {
    "thai": "วันนี้อากาศดีมาก เราไปเดินเล่นที่สวนสาธารณะใกล้บ้าน",
    "lao": "ມື້ນີ້ອາກາດດີຫຼາຍ ພວກເຮົາໄປຍ່າງຫຼິ້ນ",
    "khmer": "ថ្ងៃនេះអាកាសធាតុល្អណាស់ យើងទៅដើរលេង",
    "burmese": "ဒီနေ့ရာသီဥတုသာယာတယ် ကျွန်တော်တို့လမ်းလျှောက်သွားမယ်",
    "tibetan": "དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག ང་ཚོ་འཆམ་འཆམ་ལ་འགྲོ",
    "chinese": "今天天气很好，我们去公园散步。",
    "japanese": "今日は天気がいいので、公園へ散歩に行きましょう。ガラスﾊﾞｽ",
    "hindi": "आज मौसम बहुत अच्छा है, हम बगीचे में घूमने जाएँगे।",
    "arabic": "اَلطَّقْسُ جَمِيلٌ اليوم، سنذهب إلى الحديقة",
    "persian": "می‌خواهم به خانه‌ها بروم",
    "english": "Naïve—co\u00adoperation, don't snake_case; x\u0301 = 3.5!",
    "emoji": "good 👍🏽 bad ❤️ 1️⃣ 👩‍👩‍👧",
    "code": "if a<b: c[1] = d->e // ŞK_9",
}
TEXTS = st.one_of(
    st.lists(st.sampled_from("".join(SENTENCES.values()) + "  \n\u200b𠀀𐐀"), max_size=40).map("".join),
    st.tuples(st.sampled_from(sorted(SENTENCES.values())), st.integers(0, 30)).map(lambda of: of[0][of[1] :]),
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ที่นี่", "ที่ นี่"),
        ("ភាសាខ្មែរ", "ភា សា ខ្ មែ រ"),
        ("မြန်မာ ၁၂", "မြ န် မာ ၁၂"),
        ("བོད་སྐད", "བོ ད སྐ ད"),
        ("東京タワーx2", "東 京 タ ワ ー x2"),
        ("か\u3099く", "か\u3099 く"),
        ("हिन्दी में", "हिन्दी में"),
        ("كِتَابٌ", "كِتَابٌ"),
        ("می\u200cخواهم so\u00adft", "میخواهم soft"),
        ("ก\u200bข", "ก ข"),
        ("❤\ufe0f \u0301 👍🏽", ""),
    ],
)
def test_words_by_hand(text: str, words: str) -> None:
    assert words_of(text) == words.split()


@given(TEXTS, st.booleans())
@settings(deadline=None, max_examples=300)
def test_words_are_those_of_the_definition(text: str, joined: bool) -> None:
    assert words_of(text, joined) == [word for _, word in plain_words(text, joined=joined)]
    data, _ = buffers(pa.array([text]))
    starts, at = [], 0
    while at < len(data):
        begin, at = next_word(data, at, len(data), character_classes())
        starts += [begin] * (begin < len(data))
    assert starts == [len(text[:start].encode()) for start, _ in plain_words(text)]


@given(TEXTS)
@settings(deadline=None, max_examples=200)
def test_every_kernel_goes_by_the_definition(text: str) -> None:
    words = [word for _, word in plain_words(text, letters="_")]
    (shingles,) = shingle_sets(pa.array([text], pa.string()), ngram=1, seed=0, signs="none")
    assert len(shingles) == len(set(words))
    data = np.frombuffer(text.encode(), np.uint8)
    hashes, starts = np.empty(len(data) + 1, np.uint64), np.empty(len(data) + 1, np.int32)
    count = read_words(data, 0, len(data), classes(), hashes, starts)
    places = [len(text[:start].encode()) for start, _ in plain_words(text, letters="_")]
    assert starts[:count].tolist() == places
    for joined in (False, True):
        sought = Sequences([text], ngram=1, joined=joined)
        found = [match.words for match in sought.find(pa.array([text], pa.string()))]
        assert found == [word for _, word in plain_words(text, joined=joined)]
        assert sought.windows.tolist() == [len(found)]


@pytest.mark.parametrize("script", ["thai", "lao", "khmer", "burmese", "tibetan", "chinese", "japanese"])
def test_a_script_without_spaces_has_a_word_for_each_letter(script: str) -> None:
    """So a change of one letter changes no more shingles than there are words in one."""
    words = words_of(SENTENCES[script])
    assert len(words) >= 12
    letters = [one for one in SENTENCES[script] if character_classes()[ord(one)] == UNSPACED]
    assert [word[0] for word in words] == letters
    assert all(character_classes()[ord(mark)] in (MARK, IGNORED) for word in words for mark in word[1:])


def test_no_letter_lies_beyond_the_table() -> None:
    assert not [code for code in range(TABLE_SIZE, 0x110000) if unicodedata.category(chr(code))[0] in "LN"]


def load(path: Path) -> ModuleType:
    """A module as a new process would load it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("before", "after"), [("number = 1", "number = 2"), ("number = 1", "number = 1; added = 7"), (None, None)]
)
def test_a_kernel_is_compiled_again_when_one_that_it_calls_or_a_number_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str | None
) -> None:
    """numba itself notices a change of the file alone in which a kernel stands."""
    monkeypatch.syspath_prepend(str(tmp_path))
    called = (
        "from data_pipeline.core.kernels import kernel\nnumber = 1\nadded = 5\n"
        "@kernel\ndef inner(value):\n    return value + 10\n"
    )
    caller = (
        "from data_pipeline.core.kernels import kernel\nfrom called import inner, number, added\n"
        "@kernel\ndef outer(value):\n    return inner(value) * number + added\n"
    )
    changed = called.replace(before, after) if before and after else called.replace("10", "20")
    results = []
    for source in (called, called, changed):
        (tmp_path / "called.py").write_text(source)
        os.utime(tmp_path / "called.py", ns=(0, len(results) // 2 * 10**12))
        (tmp_path / "caller.py").write_text(caller)
        os.utime(tmp_path / "caller.py", ns=(0, 0))
        monkeypatch.delitem(sys.modules, "called", raising=False)
        importlib.invalidate_caches()
        outer = load(tmp_path / "caller.py").outer
        plain = {}
        exec(source.replace("@kernel", ""), plain)
        results.append((outer(1), plain["inner"](1) * plain["number"] + plain["added"]))
        hits = sum(outer.stats.cache_hits.values())
        assert hits == (len(results) == 2), "an unchanged kernel is read from disk, a changed one is not"
    assert all(one == other for one, other in results), results
