"""A training job: what each rank reads of it, and the folders that it works in."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from data_pipeline.core.config import Config
from data_pipeline.core.files import atomic_path
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.data.corpus import Corpus
from llm.model.config import ModelConfig
from llm.pretrain.config import PretrainConfig
from llm.training import checkpoint
from llm.training.resolved import Resolved


class Job(Config):
    """Instructions for a rank: the folders it works in, and what to train."""

    config: PretrainConfig
    model: ModelConfig
    tokens: Path
    tokenizer: Path
    out: Path
    resolved: Resolved | None = None
    """Settings that the ranks compute with; None where the machine that starts them can't know: then rank 0
    works them out."""

    @property
    def scratch(self) -> Path:
        """Folder of what is needed while training lasts; whoever seals the artifact drops it."""
        return self.out / "scratch"

    @property
    def checkpoints(self) -> Path:
        return self.scratch / "checkpoints"

    @property
    def events(self) -> Path:
        return self.out / "logs" / "events.jsonl"

    @property
    def corpus(self) -> Corpus:
        """The text, as it lies in `tokens`."""
        config = self.config
        return Corpus(
            folder=self.tokens,
            context=self.model.context,
            end=end_of_text(load_tokenizer(self.tokenizer)),
            seed=config.seed,
            mixture=config.mix,
            documents=config.mask_documents,
        )

    @property
    def setup(self) -> checkpoint.Setup:
        """Setup with which a checkpoint of this job must have been made, to be resumed to the same bits."""
        assert self.resolved is not None, "what the ranks compute with is not known yet"
        names = [field.name for field in fields(checkpoint.Setup)]
        return checkpoint.Setup(**{name: getattr(self.resolved, name) for name in names})

    def resolve(self) -> Job:
        """Return a copy that knows what its ranks compute with, who must be on this machine, or on ones like it.

        Raises:
            UserError: something that is asked for cannot run here.
        """
        return self if self.resolved else self.model_copy(update={"resolved": self.config.wanted.resolve()})

    def write(self) -> Path:
        """Write what the ranks read, and return its path."""
        with atomic_path(self.scratch / "job.json") as path:
            path.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        return self.scratch / "job.json"
