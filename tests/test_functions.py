"""How long functions are."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 60
KERNELS = {"data_pipeline/clean/text_stats.py: count_text", "data_pipeline/dedup/buckets.py: compare_buckets"}
"""Compiled by numba, which would pay for what they call."""


def test_no_function_is_long_but_kernels() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for room in ("data_pipeline", "llm", "flows", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MOST_LINES
    }
    assert found == KERNELS
