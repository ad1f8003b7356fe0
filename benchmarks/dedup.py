"""The whole dedup stage, documents in to documents out: speed against text-dedup and datatrove, memory, scaling."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ours, peers
from benchmarks.corpus import documents, installed_text, random_part, text_bytes, variants
from benchmarks.measure import Contestant, Runs, Work, alternate
from benchmarks.report import Report, arguments
from data_pipeline.dedup.config import DedupConfig


def main() -> None:
    parser = arguments(__doc__, megabytes=500, peer_megabytes=60, repeats=3)
    parser.add_argument("--scale-megabytes", type=float, default=60, help="text for the scaling table")
    parser.add_argument("--times", type=int, default=10, help="how many times that is the larger input there")
    options = parser.parse_args()
    outs = options.work.resolve() / "dedup"
    corpus = installed_text(options.work, options.megabytes)
    part = random_part(corpus, options.peer_megabytes)
    tenth = random_part(corpus, options.peer_megabytes / 10)
    config = DedupConfig()
    lsh = {"bands": config.bands, "rows": config.rows}

    def contestant(
        name: str, prepare: Callable[..., Work], text: Path, repeats: int | None = None, **job: Any
    ) -> Contestant:
        job |= {"corpus": str(text), "out": str(outs / name.replace(" ", "-")), "workers": options.cores}
        return Contestant(
            name=name,
            prepare=prepare,
            job=job,
            text_bytes=text_bytes(text),
            cores=options.cores,
            repeats=repeats,
        )

    race = [
        contestant("llmill, the whole text", ours.remove_duplicates, corpus, config={}),
        contestant("llmill", ours.remove_duplicates, part, config={}),
    ]
    if not options.no_peers:
        race.append(contestant("text-dedup", peers.text_dedup, part, **lsh))
        for tokenizer, name in peers.DATATROVE.items():
            text, repeats = (tenth, 1) if tokenizer == "english" else (part, None)
            race.append(contestant(name, peers.datatrove_dedup, text, repeats, tokenizer=tokenizer, **lsh))
    scale = installed_text(options.work, options.scale_megabytes)
    steps = [
        contestant("once", ours.remove_duplicates, scale, config={}),
        contestant(
            f"{options.times} times", ours.remove_duplicates, variants(scale, options.times), config={}
        ),
    ]
    report = Report("dedup", "Dedup", lsh | {"ngram": config.ngram, "threshold": config.threshold})
    report.text(
        f"Parquet shards of documents in, shards without duplicates out (text-dedup: a saved data set), with "
        f"{config.bands} bands of {config.rows} rows of {config.ngram}-word shingles for all. llmill also drops exact "
        "duplicates, verifies candidates, and says what each removed document repeats. Memory is the peak of all "
        "processes of a contestant together."
    )
    report.admit_less(options.megabytes, text_bytes(corpus))
    all_runs = alternate(race, options.repeats, outs / "logs")
    report.race("race", all_runs, ours=all_runs[1], whole=all_runs[0])
    report.table("kept", ("", "documents", "kept"), [kept(runs) for runs in all_runs if not runs.missing])
    report.text(f"## Scaling\n\nThe larger input is the smaller with words edited, {options.times} times.\n")
    once, more = alternate(steps, options.repeats, outs / "logs")
    report.race("scaling", [once, more])
    growth = more.contestant.text_bytes / once.contestant.text_bytes
    report.data["scaling_factor"] = {"text": growth, "time": more.median / once.median}
    report.text(f"{growth:.1f} times the text takes {more.median / once.median:.1f} times as long.")
    report.write(options.results)
    shutil.rmtree(outs)


def kept(runs: Runs) -> tuple[str, int, int]:
    """Documents that a contestant was given, and those that it left."""
    job = runs.contestant.job
    return runs.contestant.name, documents(Path(job["corpus"])), peers.count_kept(Path(job["out"], "run"))


if __name__ == "__main__":
    main()
