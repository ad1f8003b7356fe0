from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.hashing import hash_column, mix

WORD = (1 << 64) - 1
GOLDEN = [15308835235846887870, 11654451310871326769, 15297323362966251776, 9291044707042240827]


def plain_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def plain_hash(text: bytes, salt: str) -> int:
    """The definition, one number at a time."""
    state = plain_mix(int.from_bytes(blake2b(salt.encode(), digest_size=8).digest(), "little") ^ len(text))
    for start in range(0, len(text), 8):
        state = plain_mix(state ^ int.from_bytes(text[start : start + 8], "little"))
    return state


@given(st.lists(st.text(max_size=30)), st.text(), st.integers(0, 5), st.integers(0, 5))
def test_a_column_is_hashed_by_the_definition(ids: list[str], salt: str, skip: int, drop: int) -> None:
    column = pa.array(ids, pa.string())[skip : max(0, len(ids) - drop)]
    assert hash_column(column, salt).tolist() == [plain_hash(id.encode(), salt) for id in column.to_pylist()]


def test_splitmix64_gives_its_published_numbers() -> None:
    """The first outputs of the generator from seed 1234567, as other implementations test them."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashes_never_change() -> None:
    """What is split, sampled and ordered by them must be again."""
    column = pa.array(["", "a", "python/os.py", "https://example.org/page?number=1"])
    assert hash_column(column, "order").tolist() == GOLDEN


def test_hashes_of_ids_that_hardly_differ_are_uniform_and_those_of_two_salts_independent() -> None:
    """Chi-square over 256 cells of top and of low bits, and of pairs of salts, within five standard deviations."""
    ids = pa.array([f"source/path/file.parquet/{number}" for number in range(1 << 17)])
    one, other = hash_column(ids, "one"), hash_column(ids, "other")
    assert len(np.unique(one)) == len(ids)
    top, low = one >> np.uint64(56), one & np.uint64(255)
    pairs = (one >> np.uint64(60) << np.uint64(4)) | (other >> np.uint64(60))
    for cells in (top, low, pairs):
        counts = np.bincount(cells.astype(np.int64), minlength=256)
        expected = len(ids) / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * (2 * 255) ** 0.5
