"""All JSON that the project prints or writes is JSON: it has no word for what is not finite."""

from __future__ import annotations

import ast
from pathlib import Path

from data_pipeline.download.records import Text, whole

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "llm", "flows", "benchmarks", "infra")


def strict(call: ast.Call) -> bool:
    """Whether a call refuses nan and infinity."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return isinstance(value := given.get("allow_nan"), ast.Constant) and value.value is False


def writers(path: Path) -> list[ast.Call]:
    """The calls of `json.dump` and `json.dumps` in a file."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")
    ]


def test_no_json_is_written_that_holds_nan_or_infinity() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    lax = [
        f"{path.relative_to(ROOT)}:{call.lineno}: say allow_nan=False"
        for path in files
        for call in writers(path)
        if not strict(call)
    ]
    assert not lax, "\n".join(lax)


def test_what_a_source_says_beside_a_text_is_kept_as_json_can_say_it() -> None:
    meta = {"score": float("nan"), "nested": {"all": [1.5, float("inf")]}, "title": "a"}
    record = whole(0, "text", meta)
    assert isinstance(record, Text)
    assert record.meta == {"score": None, "nested": {"all": [1.5, None]}, "title": "a"}
