"""Token shards as the stage leaves them, read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.core.errors import UserError
from data_pipeline.documents import corrupt, read_shard, shard_paths
from data_pipeline.tokenize.report import Split
from data_pipeline.train_tokenizer.tokenizer import sha256

TOKENIZER_KEY, TOKENS_KEY, VOCAB_KEY = b"llmill.tokenizer_sha256", b"llmill.tokens", b"llmill.vocab_size"


@dataclass(frozen=True)
class TokenBatch:
    """Documents of one row group: document i is ``tokens[offsets[i] : offsets[i + 1]]`` and has ``ids[i]``."""

    ids: list[str]
    offsets: NDArray[np.int64]
    """Shape (documents + 1,), beginning with 0."""
    tokens: NDArray[np.unsignedinteger[Any]]
    """Shape (tokens,), uint16 or uint32; every document ends with end-of-text."""


class TokenShards:
    """The token shards of one split in a folder, in their order.

    Raises:
        UserError: there are none, one is corrupt, or they come from different tokenizers.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.paths = shard_paths(folder, split)
        heads = [self._head(path) for path in self.paths]
        if len({(head[TOKENIZER_KEY], head[VOCAB_KEY]) for head in heads}) != 1:
            raise UserError(
                f"the {split} shards in {folder} come from different tokenizers; build them again"
            )
        self.tokenizer_sha256 = heads[0][TOKENIZER_KEY].decode()
        self.vocab_size = int(heads[0][VOCAB_KEY])
        self.tokens = sum(int(head[TOKENS_KEY]) for head in heads)

    def require_tokenizer(self, folder: Path) -> None:
        """See that the shards were made with the tokenizer in a folder.

        Raises:
            UserError: they were not, so that tokens would stand for other text.
        """
        require_tokenizer(self.tokenizer_sha256, folder, self.paths[0].parent)

    @staticmethod
    def _head(path: Path) -> Mapping[bytes, bytes]:
        try:
            head = pq.read_schema(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise corrupt(path, error) from error
        if missing := {TOKENIZER_KEY, TOKENS_KEY, VOCAB_KEY} - set(head):
            raise corrupt(path, ValueError(f"no token shard: its metadata lacks {sorted(missing)}"))
        return head

    def __iter__(self) -> Iterator[TokenBatch]:
        """Yield the row groups of all shards, in order."""
        for path in self.paths:
            for batch in read_shard(path):
                lists = batch.column("tokens")
                offsets = lists.offsets.to_numpy().astype(np.int64)
                tokens = lists.values.to_numpy()[offsets[0] : offsets[-1]]
                yield TokenBatch(batch.column("id").to_pylist(), offsets - offsets[0], tokens)

    def read_all(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return all tokens of the split in one array, shape (tokens,), uint16 or uint32."""
        width: type[np.uint16] | type[np.uint32] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        flat: NDArray[np.unsignedinteger[Any]] = np.empty(self.tokens, width)
        end = 0
        for batch in self:
            flat[end : end + len(batch.tokens)] = batch.tokens
            end += len(batch.tokens)
        assert end == self.tokens, f"{end} tokens in the row groups, {self.tokens} in the metadata"
        return flat


def require_tokenizer(made_with: str, tokenizer: Path, tokens: Path) -> None:
    """See that tokens in a folder were ``made_with`` the tokenizer in another (its sha256).

    Raises:
        UserError: they were not, so that tokens would stand for other text.
    """
    if made_with != sha256(tokenizer):
        raise UserError(
            f"the token shards in {tokens} were made with another tokenizer than {tokenizer}:\n"
            "tokenise the documents with this one (a step `tokenize`)"
        )
