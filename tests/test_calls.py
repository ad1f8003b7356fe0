"""What a reader can't see in a call is said in it: values that could be swapped unnoticed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("data_pipeline", "llm", "flows", "benchmarks", "infra", "tests")
MOST = 3
"""Values that a call may give by place."""


def trees() -> dict[str, ast.Module]:
    """The modules of the project, by dotted name."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths
    }


def records(tree: ast.Module) -> set[str]:
    """The dataclasses and named tuples of a module."""
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and (
            any("dataclass" in ast.unparse(one) for one in node.decorator_list)
            or "NamedTuple" in map(ast.unparse, node.bases)
        )
    }


def calls_by_place(modules: dict[str, ast.Module]) -> Iterator[str]:
    """Where a record is made from more than `MOST` values by place."""
    defined = {name: records(tree) for name, tree in modules.items()}
    for name, tree in modules.items():
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        known = defined[name] | {
            alias.asname or alias.name
            for node in imports
            for alias in node.names
            if alias.name in defined.get(node.module or "", ())
        }
        own = [
            node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in defined[name]
        ]
        for scope, names in [(tree, known), *((one, {"cls"}) for one in own)]:
            for node in ast.walk(scope):
                if not isinstance(node, ast.Call) or len(node.args) <= MOST:
                    continue
                if isinstance(node.func, ast.Name) and node.func.id in names:
                    yield f"{name}:{node.lineno} {node.func.id}"


def test_more_than_three_values_of_a_record_are_given_by_name() -> None:
    """Two numbers that were swapped in such a call went unnoticed for months."""
    assert [*calls_by_place(trees())] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("@dataclass\nclass A: ...\nA(1, 2, 3, 4)", ["m:3 A"]),
        ("class A(NamedTuple): ...\nA(1, 2, 3, x=4)", []),
        ("@dataclass(frozen=True)\nclass A:\n  def of(cls): return cls(1, 2, 3, 4)", ["m:3 cls"]),
        ("from other import B as C\nC(1, 2, 3, 4)", ["m:2 C"]),
        ("from elsewhere import D\nD(1, 2, 3, 4)", []),
    ],
)
def test_such_calls_are_found(source: str, found: list[str]) -> None:
    modules = {"m": ast.parse(source), "other": ast.parse("@dataclass\nclass B: ...")}
    assert [*calls_by_place(modules)] == found
