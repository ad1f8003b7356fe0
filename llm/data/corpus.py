"""A job's text: the flat token shards in its input folder, a stream of held-out text and one of training text or, under
a mixture, one for each source that it names; and the order in which training reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.tokenize.flat import FlatTokens, Split, Stream
from llm.data.mixture import Mixture, order_of
from llm.data.order import Indices
from llm.data.sequences import Sequences


@dataclass(frozen=True)
class Corpus:
    """Where the text lies and how it is read."""

    folder: Path
    """Folder of the token shards."""
    context: int
    end: int
    """The token that ends every document."""
    seed: int
    mixture: Mixture | None
    documents: bool
    """Whether batches hold the document index of each token."""

    def streams(self, split: Split) -> list[Stream]:
        """Return the text of a split, in the order in which its sequences are numbered."""
        flat = FlatTokens(self.folder, split)
        if split == "train" and self.mixture:
            return [flat.stream(name) for name in self.mixture.names]
        return [flat.stream()]

    def sequences(self, split: Split) -> Sequences:
        """Return the sequences of a split."""
        return Sequences(self.streams(split), self.context, self.end if self.documents else None)

    def order(self, counts: Sequence[int]) -> Callable[[int, int], Indices]:
        """(first, count) -> which training sequences so many samples read; ``counts`` are those of each stream."""
        return order_of(counts, self.seed, self.mixture)

    def left_out(self) -> dict[str, int]:
        """Return the training tokens of each source that the mixture leaves out.

        Raises:
            UserError: a source of the mixture does not exist, or has less than a sequence.
        """
        if self.mixture is None:
            return {}
        tokens = FlatTokens(self.folder, "train").sources()
        if unknown := [name for name in self.mixture.names if name not in tokens]:
            raise UserError(
                f"pretrain.mixture names {', '.join(unknown)}, but no training document comes from there:\n"
                f"the sources are {', '.join(tokens)}"
            )
        for name, sequences in zip(self.mixture.names, self.sequences("train").counts, strict=True):
            if not sequences:
                raise UserError(
                    f"source {name} of pretrain.mixture has {tokens[name]:,} training tokens, less than one sequence "
                    f"of {self.context:,}:\nleave it out of the mixture, or lower pretrain.model.context"
                )
        return {name: count for name, count in tokens.items() if name not in self.mixture.names}

    def reading(self, samples: int, before: int = 0) -> list[dict[str, Any]]:
        """Count what ``samples`` samples behind the first ``before`` read of each source, or of all without a mixture:
        sequences there are, those read, and epochs, which is the one over the other."""
        counts = self.sequences("train").counts
        names = self.mixture.names if self.mixture else (None,)
        read = [samples]
        if self.mixture:
            last, first = (self.mixture.read_before(one) for one in (before + samples, before))
            read = [after - earlier for after, earlier in zip(last, first, strict=True)]
        return [
            {"source": name, "windows": sequences, "read": times, "epochs": times / sequences}
            for name, sequences, times in zip(names, counts, read, strict=True)
        ]
