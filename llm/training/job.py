"""A training job: what each rank reads of it, and the folders that it works in."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.core.config import Config
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.data.corpus import Corpus
from llm.machine.hardware import device_kind
from llm.model.config import ModelConfig
from llm.pretrain.config import PretrainConfig
from llm.training import checkpoint


class Job(Config):
    """What a rank is told: the folders it works in, and what to train."""

    config: PretrainConfig
    model: ModelConfig
    tokens: Path
    tokenizer: Path
    out: Path

    @property
    def scratch(self) -> Path:
        """What is needed while training lasts; whoever seals the artifact drops it."""
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
        """What a checkpoint of this job must have been made with, to be gone on from to the same bits."""
        runtime = self.config.runtime
        return checkpoint.Setup(
            ranks=runtime.ranks,
            zero_stage=runtime.zero_stage,
            micro_batch=self.config.micro_batch,
            precision=self.config.precision,
            device=device_kind(),
            attention=self.config.attention()[0],
            matmul=self.config.matmul()[0],
            sequence_parallel=runtime.sequence_parallel,
            tensor_parallel=runtime.tensor_parallel,
            offload=runtime.offload,
            compile=runtime.compile,
        )
