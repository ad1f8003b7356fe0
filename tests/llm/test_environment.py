from __future__ import annotations

import pytest

from data_pipeline.core.processes import cores
from llm.machine.environment import ALLOCATOR, rank_environment, remark


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert rank_environment(1) == {"OMP_NUM_THREADS": str(cores()), "GLIBC_TUNABLES": ALLOCATOR}
    assert rank_environment(cores() + 1)["OMP_NUM_THREADS"] == "1"
    assert "is set for them" in remark()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(1) == {}
    assert "set already" in remark()
