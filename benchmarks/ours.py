"""llmill's own stages as contestants: the bodies that the pipeline runs, on `LocalContext`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.measure import Work
from benchmarks.watch import WatchedContext, sampled, summary
from data_pipeline.clean.stage import CleanConfig, clean
from data_pipeline.core.processes import process_pool
from data_pipeline.dedup.config import DedupConfig
from data_pipeline.dedup.minhash import signatures
from data_pipeline.dedup.stage import dedup
from data_pipeline.documents import SCHEMA, read_shard, shard_paths, write_shard
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext, StageConfig
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer


def empty_folder(path: str) -> Path:
    """``path`` as an empty folder."""
    folder = Path(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def sign(texts: pa.Array, permutations: int) -> int:
    """Signatures of a column of texts; how many."""
    config = DedupConfig()
    return len(signatures(texts, permutations=permutations, ngram=config.ngram, seed=0, signs=config.signs))


def sign_in_memory(corpus: str, permutations: int, threads: int) -> Work:
    """Arrow columns in memory to signatures, on threads (the kernel releases the GIL)."""
    columns = [
        batch.column("text") for path in shard_paths(Path(corpus)) for batch in read_shard(path, ["text"])
    ]
    sign(columns[0][:1], permutations)

    def work() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda column: sign(column, permutations), columns))

    return work


def sign_shards(corpus: str, permutations: int, threads: int) -> Work:
    """Parquet shards to signatures, on threads."""
    shards = shard_paths(Path(corpus))
    sign(pa.array([""]), permutations)

    def one(shard: Path) -> int:
        return sum(sign(batch.column("text"), permutations) for batch in read_shard(shard, ["text"]))

    def work() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(one, shards))

    return work


def remove_duplicates(corpus: str, out: str, workers: int, config: dict[str, Any]) -> Work:
    """Document shards to document shards; gives the stage's metrics."""
    folder = empty_folder(out)
    compile_kernels(folder / "warm-up")

    def work() -> Any:
        with LocalContext(workers) as context:
            return dedup(DedupConfig(**config), {"documents": Path(corpus)}, folder / "run", context)

    return work


def compile_kernels(folder: Path) -> None:
    """Run the stage once on a few words: what numba compiles, it keeps on disk for ever."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("in", "out"):
        folder.joinpath(name).mkdir(parents=True)
    with write_shard(folder / "in" / "documents-00000.parquet", SCHEMA) as writer:
        for number in range(4):
            writer.add(
                f"{number}", f"one two three four five six seven eight nine {number // 2}", "warm-up", "{}"
            )
    dedup(DedupConfig(), {"documents": folder / "in"}, folder / "out", LocalContext())
    start_fork_server()


def start_fork_server() -> None:
    """Have what workers are forked from import our modules, as peers' workers are forked with theirs imported."""
    with process_pool(1) as pool:
        pool.submit(int).result()


def encode(corpus: str, tokenizer: str, out: str, workers: int) -> Work:
    """Document shards to token shards; gives the stage's metrics."""
    folder = empty_folder(out)
    inputs = {"documents": Path(corpus), "tokenizer": Path(tokenizer)}
    start_fork_server()

    def work() -> Any:
        with LocalContext(workers) as context:
            return tokenize(TokenizeConfig(), inputs, folder, context)

    return work


STAGES: dict[str, tuple[Callable[..., Any], type[StageConfig]]] = {
    "download": (download, DownloadConfig),
    "clean": (clean, CleanConfig),
    "dedup": (dedup, DedupConfig),
    "train_tokenizer": (train_tokenizer, TokenizerConfig),
    "tokenize": (tokenize, TokenizeConfig),
}


def watch_stage(stage: str, config: dict[str, Any], inputs: dict[str, str], out: str, workers: int) -> Work:
    """Any stage; gives where its time went, and its metrics."""
    body, config_type = STAGES[stage]
    parsed = config_type(**config)
    folders = {name: Path(path) for name, path in inputs.items()}
    folder = empty_folder(out)
    if stage == "dedup":
        compile_kernels(folder.with_name("warm-up"))
    start_fork_server()

    def work() -> Any:
        start = time.perf_counter()
        with WatchedContext(workers) as context, sampled() as driver:
            metrics = body(parsed, folders, folder, context)
        return summary(context, driver, time.perf_counter() - start) | {"metrics": metrics}

    return work
