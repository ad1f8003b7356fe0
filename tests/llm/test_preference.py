"""Whether people prefer a model: what is said however often one looks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from llm.score.preference import preference


@pytest.mark.long
def test_of_fair_votes_looked_at_after_each_one_stream_in_twenty_at_most_is_ever_said_to_prefer() -> None:
    """The sign test for a fixed number of votes says so of three in ten."""
    streams, votes = 1000, 200
    shown = {(n, k): preference(n - k, k) for n in range(1, votes + 1) for k in range(n + 1)}
    for share, seed in ((0.5, 0), (0.7, 1)):
        chosen = (np.random.default_rng(seed).random((streams, votes)) < share).cumsum(axis=1)
        looks = [[shown[n, int(k)] for n, k in enumerate(stream, 1)] for stream in chosen]
        ever = sum(any(look.shown for look in stream) for stream in looks)
        uncovered = sum(any(not look.low < share < look.high for look in stream) for stream in looks)
        assert uncovered <= 0.05 * streams
        if share == 0.5:
            assert 0 < ever <= 0.05 * streams
            assert sum(any(look.p_value < 0.05 for look in stream) for stream in looks) > 0.25 * streams
        else:
            assert ever > 0.99 * streams


def test_the_evidence_is_a_fair_game() -> None:
    """By arithmetic over all streams: what a vote adds is 0 in the mean, where both models are equally good."""
    for first, second in ((0, 0), (3, 1), (0, 12), (40, 31)):
        now = preference(first, second).e_value
        following = (preference(first + 1, second).e_value + preference(first, second + 1).e_value) / 2
        assert following == pytest.approx(now)


def test_preferences_by_hand() -> None:
    none = preference(0, 0)
    assert (none.share, none.low, none.high, none.e_value, none.p_value) == (0.5, 0, 1, 1, 1)
    assert not preference(0, 7).shown, "2^7 / 8 = 16"
    assert preference(0, 8).shown, "2^8 / 9 = 28.4"
    assert preference(0, 8).e_value == pytest.approx(2**8 / 9)
    assert preference(0, 8).low == pytest.approx((1 / 20 / 9) ** (1 / 8)), "p^8 = 1 / (20 * 9)"
    assert preference(0, 8).high == 1
    assert preference(0, 8).p_value == pytest.approx(2 / 2**8)
    one, other = preference(12, 30), preference(30, 12)
    assert (one.share, one.low, one.high) == pytest.approx((1 - other.share, 1 - other.high, 1 - other.low))
    assert one.e_value == pytest.approx(other.e_value)
    assert one.p_value == pytest.approx(stats.binomtest(12, 42).pvalue)
    for first, second in ((1, 0), (0, 100_000), (50_000, 50_001), (3, 100_000)):
        found = preference(first, second)
        assert 0 <= found.low <= found.share <= found.high <= 1
        assert found.shown == (not found.low < 0.5 < found.high)
