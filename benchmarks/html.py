"""Main text of pages: `resiliparse` against `trafilatura`, by speed and by agreement with the text that is known.

Agreement is the F-measure of words (of characters, in scripts without spaces), each counted as often as it occurs, a
page at a time; its mean says how much of the text is found, and how little of what stands around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean

from benchmarks.extractors import NOISE, prepare
from benchmarks.measure import Contestant, alternate
from benchmarks.pages import pages
from benchmarks.report import Report, arguments
from data_pipeline.download.html_child import EXTRACTORS


def f_measure(pairs: Iterable[tuple[float, float]]) -> float:
    return mean(2 * p * r / (p + r) if p + r else 0.0 for p, r in pairs)


def chosen(found: Mapping[str, tuple[float, float]], place: int, part: str) -> list[tuple[float, float]]:
    """The scores of pages of one language or layout."""
    return [score for name, score in found.items() if name.split("/")[place] == part]


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0], megabytes=0, peer_megabytes=0, repeats=3)
    parser.add_argument("--of-each", type=int, default=8, help="pages of each language and layout")
    options = parser.parse_args()
    made = list(pages(options.of_each, NOISE))
    size = sum(len(page.source.encode()) for page in made)
    contestants = [
        Contestant(
            name=name,
            prepare=prepare,
            job={"extractor": name, "of_each": options.of_each},
            text_bytes=size,
            cores=1,
        )
        for name in (["resiliparse"] if options.no_peers else EXTRACTORS)
    ]
    all_runs = alternate(contestants, options.repeats, options.work / "logs")
    report = Report("html", "Main text of pages", {"pages": len(made), "bytes": size})
    report.text(f"{len(made)} pages, {size / 1e6:.0f} MB with {NOISE} bytes of script and style in each.")
    report.table(
        "speed",
        ("extractor", "pages/s", "MB/s", "peak MB"),
        [(runs.contestant.name, len(made) / runs.median, runs.rate, max(runs.peak_bytes) / 1e6)
         for runs in all_runs if not runs.missing],
    )  # fmt: skip
    scores = {runs.contestant.name: runs.results[0] for runs in all_runs if not runs.missing}
    report.table(
        "quality",
        ("extractor", "F", "precision", "recall"),
        [(name, f_measure(found.values()), mean(p for p, _ in found.values()), mean(r for _, r in found.values()))
         for name, found in scores.items()],
    )  # fmt: skip
    for place, kind in enumerate(("language", "layout")):
        parts = dict.fromkeys(page.name.split("/")[place] for page in made)
        rows = [
            [
                part,
                *(
                    f_measure(v for k, v in found.items() if k.split("/")[place] == part)
                    for found in scores.values()
                ),
            ]
            for part in parts
        ]
        report.table(f"by_{kind}", (f"F by {kind}", *scores), rows)
    report.data["scores"] = scores
    report.write(options.results)


if __name__ == "__main__":
    main()
