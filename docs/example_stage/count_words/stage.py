"""The config and the body of the stage."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from data_pipeline.core.files import atomic_path
from data_pipeline.documents import read_shard, shard_paths
from data_pipeline.stage import Metrics, StageConfig, StageContext


class CountWordsConfig(StageConfig):
    """Which words are counted."""

    least: int = Field(default=1, ge=1)
    """Words that occur less often are left out."""


def count_words(
    config: CountWordsConfig, inputs: Mapping[str, Path], out: Path, context: StageContext
) -> Metrics:
    """Count the words of ``inputs["documents"]`` into ``words.json``."""
    counts: Counter[str] = Counter()
    shards = shard_paths(inputs["documents"])
    for done, found in enumerate(context.map(count_shard, shards), 1):
        counts += found
        context.progress(done, len(shards), "shards")
    kept = {word: count for word, count in counts.most_common() if count >= config.least}
    with atomic_path(out / "words.json") as path:
        path.write_text(json.dumps(kept, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")
    return {"words": float(len(kept))}


def count_shard(path: Path) -> Counter[str]:
    """Count the words of one shard. It runs in another process, so it stands at the top of a module."""
    counts: Counter[str] = Counter()
    for batch in read_shard(path, ["text"]):
        for text in batch.column("text").to_pylist():
            counts.update(text.split())
    return counts
