"""Files that llmill ships: they are found from anywhere, and are what the docs say."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin


def items(name: str) -> list[dict[str, Any]]:
    [file] = pin([Path(f"llmill://{name}.jsonl")], "evaluate.tasks")
    return [item for _, item in file.json_lines()]


def is_python(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            compile(text, "item", "exec")
        except SyntaxError:
            return False
    return True


def test_one_is_found_from_any_folder_and_another_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert items("python_order")
    with pytest.raises(
        UserError, match=r"evaluate\.tasks: llmill ships no \.\./x, but english_agreement\.jsonl, "
    ):
        pin([Path("llmill://../x")], "evaluate.tasks")


def test_of_two_orders_of_the_same_characters_one_is_python() -> None:
    found = items("python_order")
    assert len(found) == 228
    assert len({json.dumps(item) for item in found}) == 228
    for item in found:
        good, bad = item["sentence_good"], item["sentence_bad"]
        assert Counter(good) == Counter(bad)
        assert is_python(good), good
        assert not is_python(bad), bad


def test_of_two_sentences_each_word_is_right_as_often_as_it_is_wrong() -> None:
    found = items("english_agreement")
    assert len(found) == 180
    assert len({item["sentence_good"] for item in found}) == 180
    right: Counter[tuple[str, str]] = Counter()
    for item in found:
        good, bad = item["sentence_good"].split(), item["sentence_bad"].split()
        changes = [
            one for one in SequenceMatcher(None, good, bad, autojunk=False).get_opcodes() if one[0] != "equal"
        ]
        [(_, start, end, other, other_end)] = changes
        assert (end - start, other_end - other) == (1, 1), item
        right[good[start], bad[other]] += 1
    for (word, instead), count in right.items():
        assert right[instead, word] == count, (word, instead)
