"""A job's text on disk: the flat files in its scratch folder, one of held-out text and one of training text, or, under
a mixture, one for each source that it names; and the order in which training reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.tokenize.shards import TokenShards
from llm.data.mixture import Mixture
from llm.data.order import Indices, batch_windows
from llm.data.sequences import Windows, write_flat, write_flat_by_source


@dataclass(frozen=True)
class Corpus:
    """Where the text lies and how it is read."""

    folder: Path
    vocab_size: int
    context: int
    end: int
    """The token that ends every document."""
    seed: int
    mixture: Mixture | None
    documents: bool
    """Whether batches say which document each token belongs to."""

    def paths(self, split: Literal["train", "val"]) -> list[Path]:
        """The flat files of a split, in the order in which their windows are numbered."""
        if split == "train" and self.mixture:
            return [self.folder / f"train-{name}.bin" for name in self.mixture.names]
        return [self.folder / f"{split}.bin"]

    def windows(self, split: Literal["train", "val"]) -> Windows:
        """The windows of a split."""
        end = self.end if self.documents else None
        return Windows(self.paths(split), self.vocab_size, self.context, end)

    def order(self, windows: Windows) -> Callable[[int, int], Indices]:
        """(first, count) -> which of the training ``windows`` so many slots read."""
        if self.mixture:
            return self.mixture.order(windows.counts, self.seed)
        return partial(batch_windows, seed=self.seed, total=len(windows))

    def lay(self, train: TokenShards, held_out: TokenShards) -> dict[str, int]:
        """Write what is not there yet.

        Returns:
            The training tokens of each source there is, under a mixture; else nothing.

        Raises:
            UserError: a source of the mixture does not exist, or has less than a window.
        """
        (val,) = self.paths("val")
        if not val.exists():
            write_flat(held_out, val, self.vocab_size, self.end)
        if self.mixture:
            return self._lay_sources(self.mixture, train)
        (flat,) = self.paths("train")
        if not flat.exists():
            write_flat(train, flat, self.vocab_size, self.end)
        return {}

    def _lay_sources(self, mixture: Mixture, train: TokenShards) -> dict[str, int]:
        record = self.folder / "sources.json"  # written last
        if not record.exists():
            paths = dict(zip(mixture.names, self.paths("train"), strict=True))
            counts = write_flat_by_source(train, paths, self.vocab_size, self.end)
            with atomic_path(record) as path:
                path.write_text(json.dumps(counts, allow_nan=False), encoding="utf-8")
        tokens: dict[str, int] = json.loads(record.read_text(encoding="utf-8"))
        for name, windows in zip(mixture.names, self.windows("train").counts, strict=True):
            if not windows:
                raise UserError(
                    f"source {name} of pretrain.mixture has {tokens[name]:,} training tokens, less than one window "
                    f"of {self.context:,}:\nleave it out of the mixture, or lower pretrain.model.context"
                )
        return tokens

    def reading(self, slots: int) -> list[dict[str, Any]]:
        """What ``slots`` slots read of each source, or of all without a mixture: windows there are, windows read,
        and epochs, which is the one over the other."""
        counts = self.windows("train").counts
        names = self.mixture.names if self.mixture else (None,)
        read = self.mixture.read_before(slots) if self.mixture else [slots]
        return [
            {"source": name, "windows": windows, "read": times, "epochs": times / windows}
            for name, windows, times in zip(names, counts, read, strict=True)
        ]
