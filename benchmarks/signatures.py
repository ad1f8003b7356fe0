"""Signatures: MB/s of text on one core and on two, against Daft, rensa and datatrove."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import ours, peers
from benchmarks.corpus import installed_text, random_part, text_bytes
from benchmarks.measure import Contestant, Work, alternate
from benchmarks.report import Report, arguments
from data_pipeline.dedup.config import DedupConfig

DAFT = {
    "same": "Daft, same words",
    "spaces": "Daft, words between spaces",
    "normalised": "Daft, normalised text",
}


def main() -> None:
    options = arguments(__doc__, megabytes=120, peer_megabytes=12, repeats=3).parse_args()
    corpus = installed_text(options.work, options.megabytes)
    part = random_part(corpus, options.peer_megabytes)
    size, part_size, cores = text_bytes(corpus), text_bytes(part), options.cores
    bands, rows = DedupConfig().bands, DedupConfig().rows
    entries, outs = bands * rows, options.work.resolve() / "signatures"

    def signer(name: str, prepare: Callable[..., Work], cores: int, **job: Any) -> Contestant:
        return Contestant(
            name=name,
            prepare=prepare,
            job={"corpus": str(corpus), "permutations": entries, **job},
            text_bytes=size,
            cores=cores,
        )

    def datatrove(tokenizer: str, repeats: int | None = None) -> Contestant:
        job = {"corpus": str(part), "workers": cores, "bands": bands, "rows": rows, "tokenizer": tokenizer}
        job["out"] = str(outs / f"datatrove-{tokenizer}")
        return Contestant(
            name=peers.DATATROVE[tokenizer],
            prepare=peers.datatrove_signature,
            job=job,
            text_bytes=part_size,
            cores=cores,
            repeats=repeats,
        )

    one = [signer("llmill", ours.sign_in_memory, 1, threads=1)]
    many = [
        signer("llmill", ours.sign_in_memory, cores, threads=cores),
        signer("llmill, from Parquet", ours.sign_shards, cores, threads=cores),
    ]
    if not options.no_peers:
        for race, count in ((one, 1), (many, cores)):
            for words, name in DAFT.items():
                race.append(signer(name, peers.daft_minhash, count, words=words, in_memory=True))
        one.append(signer("rensa", peers.rensa_minhash, 1))
        from_parquet = f"{DAFT['same']}, from Parquet"
        many.append(signer(from_parquet, peers.daft_minhash, cores, words="same", in_memory=False))
        many += [datatrove("same"), datatrove("spaces"), datatrove("whitespace"), datatrove("english", 1)]
    report = Report("signatures", "Signatures", {"entries": entries, "ngram": peers.SHINGLE})
    report.text(
        f"MinHash signatures of {entries} entries from {peers.SHINGLE}-word shingles. Text and signatures are in "
        "memory, unless it says from Parquet (datatrove: from Parquet to its signature files). Words are runs of "
        "letters, digits and underscores, lower-cased, for all but two rows: Daft's `minhash` itself parts at spaces "
        "only, and its `normalize` joins words that only punctuation parts, both of which make fewer shingles of "
        "source code."
    )
    report.admit_less(options.megabytes, size)
    report.text("## One core\n")
    report.race("one_core", alternate(one, options.repeats, outs / "logs"))
    report.text(f"## {cores} cores\n")
    report.race("all_cores", alternate(many, options.repeats, outs / "logs"))
    report.write(options.results)


if __name__ == "__main__":
    main()
