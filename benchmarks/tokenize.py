"""Tokenise, text Parquet to token Parquet: speed against `datasets.map` and datatrove; the ids are the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import ours, peers
from benchmarks.corpus import documents, installed_text, kept, random_part, text_bytes
from benchmarks.measure import Contestant, Work, alternate
from benchmarks.report import Report, arguments
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer

KINDS = ("train", "val", "documents")
"""How the contestants' files of tokens begin."""
SAMPLE_BYTES = 20_000_000
"""Text that the tokenizer is learnt from."""


def main() -> None:
    parser = arguments(__doc__, megabytes=500, peer_megabytes=40, repeats=3)
    parser.add_argument("--vocab-size", type=int, default=32_768, help="entries of the tokenizer")
    options = parser.parse_args()
    outs = options.work.resolve() / "tokenize"
    corpus = installed_text(options.work, options.megabytes)
    part = random_part(corpus, options.peer_megabytes)
    tokenizer = learnt(corpus, options.vocab_size)

    def contestant(name: str, prepare: Callable[..., Work], text: Path, **job: Any) -> Contestant:
        job |= {"corpus": str(text), "tokenizer": str(tokenizer), "workers": options.cores}
        job["out"] = str(outs / name.replace(" ", "-"))
        return Contestant(
            name=name, prepare=prepare, job=job, text_bytes=text_bytes(text), cores=options.cores
        )

    race = [
        contestant("llmill, the whole text", ours.encode, corpus),
        contestant("llmill", ours.encode, part),
    ]
    if not options.no_peers:
        race.append(contestant("datasets.map, processes", peers.datasets_map, part, threads=False))
        race.append(contestant("datasets.map, threads", peers.datasets_map, part, threads=True))
        race.append(contestant("datatrove", peers.datatrove_tokens, part))
    report = Report("tokenize", "Tokenise", {"vocab_size": options.vocab_size})
    report.text(
        f"Parquet shards of documents in, Parquet shards of tokens out (datatrove: its own token files), with the same "
        f"byte-level BPE of {options.vocab_size} entries. llmill also splits off validation documents and shuffles by "
        "hash, and compares a sample of its ids with those of `tokenizers`."
    )
    report.admit_less(options.megabytes, text_bytes(corpus))
    all_runs = alternate(race, options.repeats, outs / "logs")
    report.race("race", all_runs, ours=all_runs[1], whole=all_runs[0])
    if not options.no_peers and not all_runs[2].missing:
        mine, theirs = (token_table(Path(runs.contestant.job["out"])) for runs in all_runs[1:3])
        differing = count_different(mine, theirs)
        assert len(mine) == documents(part), f"{len(mine)} documents of {documents(part)}"
        assert differing == 0, f"{differing} documents have other ids than `tokenizers` gives"
        report.text(f"Ids identical with those of `datasets.map` in all {len(mine)} documents.")
        report.data["identical_documents"] = len(mine)
    report.write(options.results)
    shutil.rmtree(outs)


def learnt(corpus: Path, vocab_size: int) -> Path:
    """The folder of a tokenizer learnt from the corpus, kept beside it."""
    size = min(SAMPLE_BYTES, text_bytes(corpus))

    def build(out: Path) -> None:
        config = TokenizerConfig(vocab_size=vocab_size, sample_bytes=size)
        train_tokenizer(config, {"documents": corpus}, out, LocalContext())

    return kept(corpus.with_name(f"{corpus.name}-tokenizer-{vocab_size}"), build)


def token_table(folder: Path) -> pa.Table:
    """Ids and tokens of a contestant's output, sorted by id."""
    paths = [path for path in sorted(folder.glob("*.parquet")) if path.stem.split("-")[0] in KINDS]
    wanted = pa.schema([("id", pa.large_string()), ("tokens", pa.large_list(pa.uint32()))])
    tables = [pq.read_table(path, columns=["id", "tokens"]).cast(wanted) for path in paths]
    return pa.concat_tables(tables).sort_by("id").combine_chunks()


def count_different(mine: pa.Table, theirs: pa.Table) -> int:
    """Documents of two sorted tables whose tokens differ; all of them where the ids do."""
    if not mine.column("id").equals(theirs.column("id")):
        return max(len(mine), len(theirs))
    if mine.column("tokens").equals(theirs.column("tokens")):
        return 0
    pairs = zip(mine.column("tokens"), theirs.column("tokens"), strict=True)
    return sum(one.as_py() != other.as_py() for one, other in pairs)


if __name__ == "__main__":
    main()
