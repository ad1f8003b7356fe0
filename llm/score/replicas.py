"""A model on each GPU that there is, by which batches are scored side by side. A batch comes out the same on any."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from llm.model.foreign import Scorable

Batch = TypeVar("Batch")
Found = TypeVar("Found")


class Replicas:
    """Copies of a model."""

    def __init__(self, models: Sequence[Scorable]) -> None:
        self.models = models
        self.context: int = models[0].config.context
        """Tokens that the model reads at once."""

    @classmethod
    def everywhere(cls, model: Scorable) -> Replicas:
        """Move the model to the first GPU, and copies of it to the others; leave it where it is if there is none."""
        if not torch.cuda.is_available():
            return cls([model])
        others = [copy.deepcopy(model).to(f"cuda:{gpu}") for gpu in range(1, torch.cuda.device_count())]
        return cls([model.to("cuda:0"), *others])

    def map(self, compute: Callable[[Scorable, Batch], Found], batches: Iterable[Batch]) -> Iterator[Found]:
        """Yield what ``compute`` finds with one of the copies for each batch, in the batches' order."""
        if len(self.models) == 1:
            yield from (compute(self.models[0], batch) for batch in batches)
            return
        free: SimpleQueue[Scorable] = SimpleQueue()
        for model in self.models:
            free.put(model)

        def work(batch: Batch) -> Found:
            model = free.get()
            try:
                return compute(model, batch)
            finally:
                free.put(model)

        with ThreadPoolExecutor(len(self.models), thread_name_prefix="replica") as threads:
            yield from threads.map(work, batches)
