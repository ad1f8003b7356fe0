"""Feeding a training loop from one core: tokens a second, against a DataLoader, `datasets` and random crops."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import readers
from benchmarks.corpus import installed_text, kept, text_bytes
from benchmarks.measure import Contestant, Runs, Work, alternate
from benchmarks.report import Report, arguments
from benchmarks.tokenize import learnt
from data_pipeline.core.processes import cores
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.flat import FlatTokens, flat_paths
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer

SHAPES = ((256, 32), (1024, 512))
"""(context, windows a batch): a small training on a CPU, and half a million tokens a step."""
LESS = {"torch DataLoader": 4, "datasets": 20}
"""How many times fewer tokens slow peers read."""


def main() -> None:
    parser = arguments(__doc__, megabytes=200, peer_megabytes=200, repeats=5)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens that each reads")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="entries of the tokenizer")
    options = parser.parse_args()
    outs = options.work.resolve() / "loader"
    corpus = installed_text(options.work, options.megabytes)
    shards, end = encoded(corpus, options.vocab_size)
    tokens = FlatTokens(shards, "train").tokens
    report = Report("loader", "Batches for training", {"vocab_size": options.vocab_size, "tokens": tokens})
    report.text(
        f"Batches of int64 inputs and targets from {tokens:,} tokens that lie in memory, by one core, medians. llmill, "
        "the DataLoader and `datasets` read every window once an epoch in a random order; random crops know no epochs. "
        "`datasets` packs its windows before the clock starts."
    )
    report.admit_less(options.megabytes, text_bytes(corpus))
    entries: list[tuple[str, Callable[..., Work], dict[str, Any]]] = [
        ("llmill", readers.llmill, {"shards": str(shards)}),
        ("llmill, with documents", readers.llmill, {"shards": str(shards), "end": end}),
    ]
    if not options.no_peers:
        file = {"flat": str(flat_paths(shards, "train-00000")[0]), "vocab_size": options.vocab_size}
        paths = [str(path) for path in sorted(shards.glob("train-*.parquet"))]
        entries += [
            ("random crops, as nanoGPT", readers.random_crops, file),
            ("torch DataLoader", readers.data_loader, file),
            ("datasets", readers.packed_dataset, {"shards": paths, "out": str(outs / "datasets")}),
        ]
    for context, batch in SHAPES:
        shape = {"context": context, "batch": batch}
        race = [
            Contestant(
                name=name,
                prepare=prepare,
                job={**job, **shape, "tokens": options.tokens // LESS.get(name, 1)},
                text_bytes=0,
                cores=1,
            )
            for name, prepare, job in entries
        ]
        report.text(f"## Context {context}, {batch} windows a batch\n")
        table(report, f"context_{context}", alternate(race, options.repeats, outs / "logs"))
    report.write(options.results)
    shutil.rmtree(outs)


def encoded(corpus: Path, vocab_size: int) -> tuple[Path, int]:
    """Token shards of a corpus, all training text in one, and the token that ends documents."""
    tokenizer = learnt(corpus, vocab_size)

    def encode(out: Path) -> None:
        inputs = {"documents": corpus, "tokenizer": tokenizer}
        tokenize(TokenizeConfig(shard_tokens=1 << 30), inputs, out, LocalContext(cores()))
        shutil.rmtree(out / "scratch", ignore_errors=True)

    shards = kept(corpus.with_name(f"{corpus.name}-flat-tokens-{vocab_size}"), encode)
    return shards, end_of_text(load_tokenizer(tokenizer))


def table(report: Report, key: str, all_runs: Sequence[Runs]) -> None:
    """Tokens a second of each, and how many times as fast the first is."""
    rates = [None if runs.missing else runs.results[0]["tokens"] / runs.median for runs in all_runs]
    ours = rates[0]
    assert ours
    rows = [
        (
            runs.contestant.name,
            len(runs.seconds),
            runs.missing or runs.results[0]["tokens"] / 1e6,
            rate and rate / 1e6,
            max(runs.peak_bytes, default=0) / 1e6,
            rate and ours / rate,
        )
        for runs, rate in zip(all_runs, rates, strict=True)
    ]
    header = ("", "runs", "million tokens read", "million tokens/s", "peak MB", "llmill / this")
    report.table(key, header, rows)
    report.data[f"{key}_seconds"] = {runs.contestant.name: runs.seconds for runs in all_runs}


if __name__ == "__main__":
    main()
