"""A job's text: the flat token shards in its input folder, a stream of held-out text and one of training text or, under
a mixture, one for each source that it names; and the order in which training reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.tokenize.flat import FlatTokens, Split, Stream
from llm.data.mixture import Mixture
from llm.data.order import Indices, batch_windows
from llm.data.sequences import Windows


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
    """Whether batches say which document each token belongs to."""

    def streams(self, split: Split) -> list[Stream]:
        """The text of a split, in the order in which its windows are numbered."""
        flat = FlatTokens(self.folder, split)
        if split == "train" and self.mixture:
            return [flat.stream(name) for name in self.mixture.names]
        return [flat.stream()]

    def windows(self, split: Split) -> Windows:
        """The windows of a split."""
        return Windows(self.streams(split), self.context, self.end if self.documents else None)

    def order(self, windows: Windows) -> Callable[[int, int], Indices]:
        """(first, count) -> which of the training ``windows`` so many slots read."""
        if self.mixture:
            return self.mixture.order(windows.counts, self.seed)
        return partial(batch_windows, seed=self.seed, total=len(windows))

    def left_out(self) -> dict[str, int]:
        """The training tokens of each source that the mixture leaves out.

        Raises:
            UserError: a source of the mixture does not exist, or has less than a window.
        """
        if self.mixture is None:
            return {}
        tokens = FlatTokens(self.folder, "train").sources()
        if unknown := [name for name in self.mixture.names if name not in tokens]:
            raise UserError(
                f"pretrain.mixture names {', '.join(unknown)}, but no training document comes from there:\n"
                f"the sources are {', '.join(tokens)}"
            )
        for name, windows in zip(self.mixture.names, self.windows("train").counts, strict=True):
            if not windows:
                raise UserError(
                    f"source {name} of pretrain.mixture has {tokens[name]:,} training tokens, less than one window "
                    f"of {self.context:,}:\nleave it out of the mixture, or lower pretrain.model.context"
                )
        return {name: count for name, count in tokens.items() if name not in self.mixture.names}

    def reading(self, slots: int) -> list[dict[str, Any]]:
        """Count what ``slots`` slots read of each source, or of all without a mixture: windows there are, windows read,
        and epochs, which is the one over the other."""
        counts = self.windows("train").counts
        names = self.mixture.names if self.mixture else (None,)
        read = self.mixture.read_before(slots) if self.mixture else [slots]
        return [
            {"source": name, "windows": windows, "read": times, "epochs": times / windows}
            for name, windows, times in zip(names, counts, read, strict=True)
        ]
