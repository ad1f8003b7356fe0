"""Score tasks: items a second against a plain loop around `transformers`, on the same model; both choose alike.

    python -m benchmarks.score --model FOLDER --tasks FOLDER

MODEL is a folder that `transformers` loads; TASKS holds arc_easy.jsonl.gz, piqa.jsonl.gz, copa.jsonl.gz and
winograd_wsc.jsonl.gz in the form of CORE's bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Contestant, alternate
from benchmarks.report import Report, arguments
from benchmarks.scorers import ours, plain_loop
from llm.score.prompts import Kind

ANSWER = "\nAnswer: "
TASKS: tuple[tuple[str, Kind, str, int], ...] = (
    ("arc_easy", "choice", ANSWER, 10),
    ("piqa", "choice", ANSWER, 10),
    ("copa", "choice", " ", 0),
    ("winograd_wsc", "schema", " ", 0),
    ("arc_easy", "choice", ANSWER, 0),
)
"""File, its kind, what stands between question and answer, shots: as CORE's bundle has them, and one without shots."""


def main() -> None:
    parser = arguments(__doc__, megabytes=0, peer_megabytes=0, repeats=3)
    parser.add_argument("--model", type=Path, required=True, help="a folder that transformers loads")
    parser.add_argument("--tasks", type=Path, required=True, help="the folder of the tasks' files")
    parser.add_argument("--items", type=int, default=100, help="of each task (default %(default)s)")
    options = parser.parse_args()
    report = Report("score", "Score tasks", {"items": options.items})
    report.text(
        f"The first {options.items} items of each task, in fp32 on {options.cores} cores. The plain loop "
        "takes one item at a time: its options padded to one batch of `transformers`' own forward pass, whose logits "
        "give the log-probabilities. The model's load is not counted. Medians of the runs, which took turns."
    )
    rows = []
    for name, kind, delimiter, shots in TASKS:
        path = options.tasks / f"{name}.jsonl.gz"
        job: dict[str, Any] = {
            "model": str(options.model),
            "path": str(path),
            "kind": kind,
            "delimiter": delimiter,
        }
        job |= {"shots": shots, "count": options.items}
        contestants = [
            Contestant(
                name=f"{what}, {name}, {shots} shots",
                prepare=prepare,
                job=job,
                text_bytes=0,
                cores=options.cores,
            )
            for what, prepare in (("llmill", ours), ("transformers", plain_loop))
        ]
        mine, theirs = alternate(contestants, options.repeats, options.work.resolve() / "score" / "logs")
        pairs = list(zip(mine.results[0], theirs.results[0], strict=True))
        alike = float(np.mean([choice(one) == choice(other) for one, other in pairs]))
        apart = max(
            abs(nats - other) / count
            for options_of in pairs
            for (nats, count), (other, _) in zip(*options_of, strict=True)
        )
        rates = [len(pairs) / runs.median for runs in (mine, theirs)]
        rows.append([name, shots, len(pairs), *rates, theirs.median / mine.median, alike, apart])
    header = (
        "task",
        "shots",
        "items",
        "llmill, items/s",
        "plain loop, items/s",
        "times",
        "chosen alike",
        "nats a token apart",
    )
    report.table("race", header, rows)
    report.write(options.results)


def choice(options: list[list[float]]) -> int:
    """Return the option of the least mean loss; each is a sum and a number of tokens."""
    return int(np.argmin([nats / tokens for nats, tokens in options]))


if __name__ == "__main__":
    main()
