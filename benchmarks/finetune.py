"""Finetune on conversations: tokens a second beside a plain loop around `transformers` and TRL, packed and not.

    python -m benchmarks.finetune --model FOLDER --data FILE

MODEL is a folder that `transformers` loads, with a chat template; DATA is a file of conversations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Contestant, Work, alternate
from benchmarks.report import Report, arguments
from benchmarks.tuners import STEP, ours, plain_loop, trl
from llm.machine.environment import rank_environment


def main() -> None:
    parser = arguments(__doc__, megabytes=0, peer_megabytes=0, repeats=3)
    parser.add_argument("--model", type=Path, required=True, help="a folder that transformers loads")
    parser.add_argument("--data", type=Path, required=True, help="a file of conversations")
    parser.add_argument("--conversations", type=int, default=96, help="of the file (default %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row (default %(default)s)")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    options = parser.parse_args()
    os.environ.update(rank_environment(1))  # what our launcher sets is given to all
    job: dict[str, Any] = {
        "model": str(options.model), "data": str(options.data.absolute()), "count": options.conversations,
        "context": options.context, "precision": options.precision,
    }  # fmt: skip
    wanted: list[tuple[str, Callable[..., Work], dict[str, Any]]] = [
        ("llmill, packed", ours, {"packing": True}),
        ("llmill, a row a conversation", ours, {"packing": False}),
        ("transformers, plain loop", plain_loop, {}),
        ("TRL, packed", trl, {"packing": True}),
        ("TRL, a row a conversation", trl, {"packing": False}),
    ]
    contestants = [
        Contestant(name=name, prepare=prepare, job=job | more, text_bytes=0, cores=options.cores)
        for name, prepare, more in (wanted[:2] if options.no_peers else wanted)
    ]
    runs = alternate(contestants, options.repeats, options.work.resolve() / "finetune" / "logs")
    report = Report("finetune", "Finetune on conversations", {"conversations": options.conversations})
    report.text(
        f"One pass over {options.conversations} conversations with {options.model.name}, products in "
        f"{options.precision}, on {options.cores} cores. A step has {STEP} conversations, or with packing 4 rows of "
        f"{options.context} tokens. Only tokens of text count. Loading and compiling are not timed. Medians of the "
        "runs, which took turns."
    )
    peer = next((one for one in runs if one.contestant.prepare is plain_loop and not one.missing), None)
    rows = []
    for one in runs:
        if one.missing:
            report.text(f"{one.contestant.name}: {one.missing}.")
            continue
        rate = one.results[0]["tokens"] / one.median
        against = peer.results[0]["tokens"] / peer.median if peer else rate
        found = one.results[0]
        rows.append(
            [one.contestant.name, found["steps"], one.median, rate, rate / against, max(one.peak_bytes) / 1e9]
        )
    report.table("race", ("", "steps", "seconds", "tokens/s", "times the plain loop", "memory (GB)"), rows)
    report.write(options.results)


if __name__ == "__main__":
    main()
