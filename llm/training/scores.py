"""Scores of a model in training on sets and tasks, by the functions that ``evaluate`` scores with."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile, pin
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, token_bytes
from llm.data.bits import bits_per_byte
from llm.model.transformer import Transformer
from llm.score.config import SetConfig, TaskConfig, ValidateOn
from llm.score.encode import common
from llm.score.items import read_items
from llm.score.prompts import Prompt
from llm.score.replicas import Replicas
from llm.score.sets import PreparedSet, first_texts, run_set
from llm.score.task import PreparedTask, first_token, prompts_of, run_task, summarise

KEY = "pretrain.runtime.validate_on"
BYTES_A_TOKEN = 3
"""English has 3.4 under a vocabulary of 4,096 and more under larger ones; few scripts have less than 2."""
LOGGED = ("gold_bits_per_byte", "accuracy")
"""Metrics of a task that are logged."""


class Chosen:
    """Sets and tasks with their files as they are now, each cut to the documents or items that are scored."""

    def __init__(self, wanted: ValidateOn) -> None:
        """Find the files.

        Raises:
            UserError: one can't be read, or has another checksum than it must.
        """
        self.sets: list[tuple[SetConfig, PinnedFile]] = []
        self.tasks: list[tuple[TaskConfig, PinnedFile]] = []
        for one in wanted.sets:
            [file] = pin([one.path], f"{KEY}.sets")
            if one.sha256 not in (None, file.sha256):
                raise UserError(f"{KEY}.sets: {one.path} has the sha256 {file.sha256}, not {one.sha256}")
            cut = {"path": file.path, "max_documents": wanted.most(one.max_documents)}
            self.sets.append((one.model_copy(update=cut), file))
        for task in wanted.tasks:
            [file] = pin([task.path], f"{KEY}.tasks")
            cut = {"path": file.path, "max_items": wanted.most(task.max_items)}
            self.tasks.append((task.model_copy(update=cut), file))


def checked(wanted: ValidateOn) -> tuple[ValidateOn, int]:
    """Read all that is to be scored; return it with absolute paths, for ranks that start in another folder, and about
    how many tokens it has, whatever tokenizer will be there.

    Raises:
        UserError: a file can't be read, has another checksum than it must, no texts, or what is no item of its task.
    """
    chosen, size = Chosen(wanted), 0
    for one, file in chosen.sets:
        size += sum(len(text.encode()) for _, text in first_texts(one, file))
    for task, file in chosen.tasks:
        size += sum(map(bytes_read, prompts_of(task, read_items(task, file))))
    sets, tasks = (tuple(one for one, _ in found) for found in (chosen.sets, chosen.tasks))
    return wanted.model_copy(update={"sets": sets, "tasks": tasks}), math.ceil(size / BYTES_A_TOKEN)


def bytes_read(prompt: Prompt) -> int:
    """Count the bytes of a prompt, those that its texts begin with in common once, as they are scored."""
    texts = [text.encode() for text in prompt.texts]
    shared = common(texts)
    return shared + sum(len(text) - shared for text in texts)


class Scorer:
    """Sets and tasks, and the tokenizer in a folder, by which models are scored again and again."""

    def __init__(self, wanted: ValidateOn, folder: Path, context: int) -> None:
        self.chosen, self.context = Chosen(wanted), context
        self.tokenizer = load_tokenizer(folder)
        self.sizes, self.first = token_bytes(folder), first_token(self.tokenizer, folder)

    @cached_property
    def sets(self) -> list[PreparedSet]:
        """The sets, read and tokenized once.

        Raises:
            UserError: a file is no longer what it was.
        """
        return [PreparedSet.of(one, file, self.tokenizer) for one, file in self.chosen.sets]

    @cached_property
    def tasks(self) -> list[PreparedTask]:
        """The tasks, read and encoded once; errors as of `sets`."""
        return [
            PreparedTask.of(task, file, self.tokenizer, first=self.first, room=self.context)
            for task, file in self.chosen.tasks
        ]

    def scores(self, model: Transformer) -> dict[str, float]:
        """Return ``SET/bits_per_byte`` of each set, ``TASK/gold_bits_per_byte`` and ``TASK/accuracy`` of each task.

        Raises:
            UserError: a file was no longer what it was when it was to be read.
        """
        found, end = {}, end_of_text(self.tokenizer)
        for one in self.sets:
            rows = run_set(Replicas([model]), one, end=end, sizes=self.sizes, progress=ignore)
            nats, size = math.fsum(row["text_nats"] for row in rows), sum(row["bytes"] for row in rows)
            found[f"{one.chosen.name}/bits_per_byte"] = bits_per_byte(nats, size)
        for task in self.tasks:
            metrics = summarise(
                run_task(Replicas([model]), self.tokenizer, task, sizes=self.sizes, progress=ignore)
            )
            found |= {f"{task.task.name}/{name}": metrics[name] for name in LOGGED}
        return found


def ignore(done: int, total: int) -> None:
    """Show no progress."""
