"""Extractors of the main text of pages, as contestants of `benchmarks.html`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from benchmarks.measure import Work
from benchmarks.pages import Page, pages
from data_pipeline.download.html import EXTRACTORS, HtmlRules

NOISE = 30_000
"""Bytes of script and style in a page, as real pages have more of them than of text."""
WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff]+")


def prepare(extractor: str, of_each: int) -> Work:
    """Start the extractor's process; the work is all pages."""
    made = list(pages(of_each, NOISE))
    rules = HtmlRules.model_validate({"extractor": extractor})
    EXTRACTORS.ask("<p>first</p>", rules)

    def work() -> Any:
        return {
            page.name: agreement(page, EXTRACTORS.ask(page.source, rules).get("text", "")) for page in made
        }

    return work


def agreement(page: Page, found: str) -> tuple[float, float]:
    """Precision and recall of the text that was found."""
    expected, got = (Counter(WORD.findall(text.casefold())) for text in (page.text, found))
    common = (expected & got).total()
    return common / max(1, got.total()), common / max(1, expected.total())
