from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


class TokenShards:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = self._metadata(self.paths("train")[0])
        self.vocab_size = int(metadata[b"llmill.vocab_size"])

    def paths(self, split: str) -> list[Path]:
        return sorted(self.folder.glob(f"{split}-*.parquet"))

    def _metadata(self, path: Path) -> dict[bytes, bytes]:
        return pq.read_schema(path).metadata or {}

    def token_count(self, split: str) -> int:
        return sum(int(self._metadata(path)[b"llmill.tokens"]) for path in self.paths(split))

    def documents(self, split: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for path in self.paths(split):
            for batch in pq.ParquetFile(path).iter_batches(columns=["id", "tokens"]):
                ids, tokens = batch.column("id"), batch.column("tokens")
                offsets = tokens.offsets.to_numpy()
                values = tokens.values.to_numpy()
                for row in range(len(batch)):
                    yield ids[row].as_py(), values[offsets[row] : offsets[row + 1]]


def token_bytes(folder: Path) -> np.ndarray[Any, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = tokenizer.get_added_tokens_decoder()
    return np.array(
        [0 if i in special else len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())], np.int32
    )


def load_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))
