"""What tests of trainings on packed rows have in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("What is the capital of France?", "Paris."), ("日本の首都は？", "東京です。"), ("เมืองหลวงของไทยคืออะไร", "กรุงเทพฯ"),
    ("ما عاصمة مصر؟", "القاهرة"), ("भारत की राजधानी क्या है?", "नई दिल्ली"), ("def f(x):\n\treturn", " x ** 2\n"),
    ("🍎 + 🍎 =", "2 × 🍎 👩\u200d👩\u200d👧"), ("Say nothing.", "\n\nNothing.\n"),
]  # fmt: skip
"""Questions and answers in many scripts."""


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def payload(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that would be sealed."""
    sealed = [path for path in out.rglob("*") if path.relative_to(out).parts[0] not in ("logs", "scratch")]
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sealed
        if path.is_file()
    }
