"""Token shards as training reads them: flat, and mapped into memory.

Beside each Parquet shard lie its tokens end to end in ``flat/train-00000.bin`` (little endian; two bytes a token where
the vocabulary fits, else four), and in ``flat/train-00000.arrow`` where each document is: source after source, within
a source in the order of the tokens. So a split is read as one sequence of tokens, or one source of it as if it alone
were there, and nobody ever writes that sequence down. Nothing of a file is held in memory but what is read of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.documents import corrupt, read_shard, shard_paths
from data_pipeline.stage import StageContext
from data_pipeline.tokenize.report import SPLITS, Split
from data_pipeline.tokenize.shards import TOKENIZER_KEY, TOKENS_KEY, VOCAB_KEY, TokenShards, require_tokenizer

FOLDER = "flat"
SOURCES_KEY = b"llmill.sources"
"""Metadata of an index: JSON, name of a source -> [documents, tokens] in the shard, in order of name."""
COLUMNS = pa.schema([("start", pa.int64()), ("end", pa.int64())])
"""Columns of an index, a row a document: its first token's index in the shard's flat file; and how many tokens of its
source the shard has up to its last one, that included."""

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that made some tokens."""

    tokenizer_sha256: str
    size: int

    @property
    def token_type(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id: little endian, two bytes or four."""
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")

    def require_tokenizer(self, tokenizer: Path, tokens: Path) -> None:
        """See that the tokens in a folder were made with the tokenizer in another.

        Raises:
            UserError: they were not.
        """
        require_tokenizer(self.tokenizer_sha256, tokenizer, tokens)

    def metadata(self, tokens: int) -> dict[bytes, bytes]:
        """Return what files of ``tokens`` of its tokens hold on themselves."""
        values = {TOKENIZER_KEY: self.tokenizer_sha256, VOCAB_KEY: self.size, TOKENS_KEY: tokens}
        return {key: str(value).encode() for key, value in values.items()}


def flat_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Return where a shard's tokens and its index lie in a stage's folder."""
    return folder / FOLDER / f"{name}.bin", folder / FOLDER / f"{name}.arrow"


class Index:
    """Where the documents of a shard lie, while they are gathered."""

    def __init__(self) -> None:
        self._sources: list[pa.DictionaryArray] = []
        self._lengths: list[NDArray[np.int64]] = []

    def add(self, ids: pa.Array, lengths: NDArray[np.int64]) -> None:
        """Append documents: ids, and tokens of each. What stands before the first "/" of an id is its source."""
        names = pc.list_element(pc.split_pattern(ids.cast(pa.large_string()), "/", max_splits=1), 0)
        self._sources.append(names.dictionary_encode())
        self._lengths.append(lengths.astype(np.int64))

    def table(self, vocabulary: Vocabulary) -> pa.Table:
        """Return the rows of `COLUMNS`, and in the metadata what a reader needs to know before it reads any."""
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        coded = pa.chunked_array(self._sources, pa.dictionary(pa.int32(), pa.large_string()))
        coded = coded.unify_dictionaries().combine_chunks()
        names = coded.dictionary.to_pylist() if len(coded) else []
        codes = coded.indices.to_numpy() if len(coded) else np.empty(0, np.int32)
        order, starts = np.argsort(codes, kind="stable"), np.cumsum(lengths) - lengths
        groups = dict(zip(names, np.split(order, np.cumsum(np.bincount(codes))[:-1]), strict=False))
        sources = {name: [len(groups[name]), int(lengths[groups[name]].sum())] for name in sorted(groups)}
        columns = [
            np.concatenate([np.empty(0, np.int64), *(made(groups[name]) for name in sources)])
            for made in (lambda rows: starts[rows], lambda rows: np.cumsum(lengths[rows]))
        ]
        metadata = vocabulary.metadata(int(lengths.sum()))
        metadata[SOURCES_KEY] = json.dumps(sources, allow_nan=False).encode()
        return pa.table(columns, COLUMNS.with_metadata(metadata))


class FlatWriter:
    """Writes the tokens of one shard; holds a source and a length for each document."""

    def __init__(self, file: BinaryIO, vocabulary: Vocabulary, end: int) -> None:
        self.index = Index()
        self._file, self._kind, self._end = file, vocabulary.token_type, end

    def add(self, ids: pa.Array, documents: pa.ListArray) -> None:
        """Append documents: ids, and lists of tokens.

        Each must end with the end-of-text token and hold no other: it is how training knows where documents begin.
        """
        offsets = documents.offsets.to_numpy().astype(np.int64)
        tokens = documents.values.to_numpy()[offsets[0] : offsets[-1]]
        assert_ended(ids, offsets - offsets[0], tokens, self._end)
        self._file.write(np.ascontiguousarray(tokens, self._kind).data)
        self.index.add(ids, np.diff(offsets))


def assert_ended(ids: pa.Array, offsets: NDArray[np.int64], tokens: Tokens, end: int) -> None:
    """Assert that every document ends with token ``end`` and holds no other."""
    if np.array_equal(np.flatnonzero(tokens == end), offsets[1:] - 1):
        return
    wrong = next(
        id
        for id, first, stop in zip(ids.to_pylist(), offsets, offsets[1:], strict=True)
        if np.flatnonzero(tokens[first:stop] == end).tolist() != [stop - first - 1]
    )
    raise AssertionError(f"document {wrong} does not end with its only end-of-text token ({end})")


@contextmanager
def write_flat(folder: Path, name: str, vocabulary: Vocabulary, end: int) -> Iterator[FlatWriter]:
    """Yield a `FlatWriter` whose files appear when the block ends well, the index last."""
    tokens, index = flat_paths(folder, name)
    with atomic_path(tokens) as temporary, open(temporary, "wb") as file:
        writer = FlatWriter(file, vocabulary, end)
        yield writer
    table = writer.index.table(vocabulary)
    with (
        atomic_path(index) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)


def is_written(folder: Path, name: str) -> bool:
    """Return whether a shard's flat files are there."""
    return all(path.exists() for path in flat_paths(folder, name))


def lay_flat(folder: Path, end: int, context: StageContext) -> None:
    """Write what is missing of the flat files of a folder's Parquet shards, which may be made elsewhere.

    Raises:
        UserError: the folder lacks the shards of a split, or they are corrupt or of different tokenizers.
    """
    for split in SPLITS:
        shards = TokenShards(folder, split)
        vocabulary = Vocabulary(shards.tokenizer_sha256, shards.vocab_size)
        missing = [path for path in shards.paths if not is_written(folder, path.stem)]
        context.map(partial(lay_shard, vocabulary, end), missing, names=[path.stem for path in missing])


def lay_shard(vocabulary: Vocabulary, end: int, shard: Path) -> None:
    """Write the flat files of one Parquet shard; a row group of it is in memory at a time."""
    with write_flat(shard.parent, shard.stem, vocabulary, end) as flat:
        for batch in read_shard(shard):
            flat.add(batch.column("id"), batch.column("tokens"))


def index_of(shard: Path) -> FlatShard:
    """Return the index of a Parquet shard: as it lies beside it or, where it does not, made of it."""
    if is_written(shard.parent, shard.stem):
        return FlatShard(shard.parent, shard.stem)
    index = Index()
    for batch in read_shard(shard):
        index.add(batch.column("id"), pc.list_value_length(batch.column("tokens")).to_numpy())
    return FlatShard(shard.parent, shard.stem, index.table(Vocabulary("", 0)))


class FlatShard:
    """One shard's flat files.

    Raises:
        UserError: its index can't be read.
    """

    def __init__(self, folder: Path, name: str, table: pa.Table | None = None) -> None:
        self.path, index = flat_paths(folder, name)
        self._table = read_index(index) if table is None else table
        metadata = self._table.schema.metadata
        self.vocabulary = Vocabulary(metadata[TOKENIZER_KEY].decode(), int(metadata[VOCAB_KEY]))
        self.tokens = int(metadata[TOKENS_KEY])
        self.sources: dict[str, tuple[int, int]] = json.loads(metadata[SOURCES_KEY])
        """Documents and tokens of each source, in order of name."""

    def documents(self, source: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`COLUMNS` of the documents of a source that the shard has, mapped."""
        counts = {name: documents for name, (documents, _) in self.sources.items()}
        first = sum(count for name, count in counts.items() if name < source)
        rows = self._table.slice(first, counts[source])
        start, end = (rows.column(name).chunk(0).to_numpy() for name in COLUMNS.names)
        return start, end

    def read(self) -> Tokens:
        """Return all tokens, mapped.

        Raises:
            UserError: the file is not there, or has not as many as the index has.
        """
        kind = self.vocabulary.token_type
        try:
            if self.path.stat().st_size != self.tokens * kind.itemsize:
                raise corrupt(self.path, ValueError(f"its size is not that of {self.tokens:,} tokens"))
            if not self.tokens:
                return np.empty(0, kind)  # no empty file can be mapped
            # Arrow's mappings, unlike numpy's, hold no file open: there may be more shards than a process may open.
            with pa.memory_map(str(self.path)) as file:
                return np.frombuffer(file.read_buffer(), kind)
        except OSError as error:
            raise corrupt(self.path, error) from error


def read_index(path: Path) -> pa.Table:
    """Return the rows of a shard's index, mapped."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from error
    if missing := {TOKENIZER_KEY, TOKENS_KEY, VOCAB_KEY, SOURCES_KEY} - set(table.schema.metadata or {}):
        raise corrupt(path, ValueError(f"no index of tokens: its metadata lacks {sorted(missing)}"))
    return table


class FlatTokens:
    """The flat files of one split in a stage's folder, in the order of the shards.

    Raises:
        UserError: there are none, one is corrupt, or they come from different tokenizers.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        names = [path.stem for path in sorted((folder / FOLDER).glob(f"{split}-*.arrow"))]
        if not names:
            shard_paths(folder, split)  # which raises where there is nothing at all
            raise UserError(f"{folder} holds {split} shards without flat files ({FOLDER}/); build it again")
        self.shards = [FlatShard(folder, name) for name in names]
        if len({shard.vocabulary for shard in self.shards}) != 1:
            raise UserError(
                f"the {split} shards in {folder} come from different tokenizers; build them again"
            )
        self.vocabulary = self.shards[0].vocabulary
        self.tokens = sum(shard.tokens for shard in self.shards)

    def sources(self) -> dict[str, int]:
        """Return tokens of each source, in order of name."""
        totals: Counter[str] = Counter()
        for shard in self.shards:
            totals.update({name: tokens for name, (_, tokens) in shard.sources.items()})
        return dict(sorted(totals.items()))

    def stream(self, source: str | None = None) -> Stream:
        """Return all tokens of the split in its order, or those of one source, as if they lay end to end."""
        if source is None:
            return Stream([StreamShard(shard.read()) for shard in self.shards])
        with_it = [shard for shard in self.shards if source in shard.sources]
        return Stream([StreamShard(shard.read(), *shard.documents(source)) for shard in with_it])


@dataclass(frozen=True)
class StreamShard:
    """Tokens of a stream in one shard: all of it or, with `starts` and `ends`, some documents of it."""

    tokens: Tokens
    starts: NDArray[np.int64] | None = None
    """Shape (documents,): where each begins in `tokens`."""
    ends: NDArray[np.int64] | None = None
    """Shape (documents,): tokens of the stream in the shard up to the end of each."""

    def __len__(self) -> int:
        return len(self.tokens) if self.ends is None else int(self.ends[-1])

    def slices(self, start: int) -> Iterator[Tokens]:
        """Yield contiguous slices of `tokens`, from token ``start`` of the stream in the shard to the end."""
        if self.starts is None or self.ends is None:
            yield self.tokens[start:]
            return
        document = int(self.ends.searchsorted(start, side="right"))
        begun = int(self.ends[document - 1]) if document else 0
        for number in range(document, len(self.ends)):
            offset, end = int(self.starts[number]) - begun, int(self.ends[number])
            yield self.tokens[offset + start : offset + end]
            start = begun = end


class Stream:
    """Tokens that are read as if they lay end to end, wherever they do."""

    def __init__(self, shards: Iterable[StreamShard]) -> None:
        self.shards: Sequence[StreamShard] = [shard for shard in shards if len(shard)]
        self.firsts: NDArray[np.int64] = np.cumsum([0, *map(len, self.shards)])
        """Shape (shards + 1,): tokens before each shard, and of all."""

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def token_type(self) -> np.dtype[Any]:
        return self.shards[0].tokens.dtype if self.shards else np.dtype("<u2")

    def read(self, starts: NDArray[np.int64], length: int) -> Tokens:
        """Read rows of ``length`` tokens, shape (rows, length), from each of ``starts``; all must lie in the stream."""
        if len(starts) and len(self.shards) == 1 and self.shards[0].ends is None:
            return sliding_window_view(self.shards[0].tokens, length)[starts]
        # Rows are spread over the shards, so few are of one: row by row costs less than numpy takes for each shard.
        rows: Tokens = np.empty((len(starts), length), self.token_type)
        owners = np.searchsorted(self.firsts, starts, side="right") - 1
        offsets = starts - self.firsts[owners]
        for row, owner, start in zip(rows, owners.tolist(), offsets.tolist(), strict=True):
            self._fill(row, owner, start)
        return rows

    def _fill(self, row: Tokens, owner: int, start: int) -> None:
        """Copy what begins at token ``start`` of shard ``owner``, slice by slice."""
        filled = 0
        for number in range(owner, len(self.shards)):
            for tokens in self.shards[number].slices(start):
                taken = tokens[: len(row) - filled]
                row[filled : filled + len(taken)] = taken
                filled += len(taken)
                if filled == len(row):
                    return
            start = 0
        raise AssertionError(f"the stream ends before {len(row)} tokens from {start} of shard {owner}")
