"""A training job: what each rank reads of it, and the folders that it works in."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from data_pipeline.core.config import Config
from data_pipeline.core.files import atomic_path
from data_pipeline.stage import StageContext
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.data.corpus import Corpus
from llm.data.packed import Packed
from llm.machine.environment import remark
from llm.model.config import Lora, ModelConfig
from llm.pretrain.config import PretrainConfig
from llm.training import checkpoint
from llm.training.objective import NEXT_TOKEN, Objective
from llm.training.resolved import Resolved


class Job(Config):
    """Instructions for a rank: the folders it works in, and what to train."""

    config: PretrainConfig
    model: ModelConfig
    tokens: Path
    tokenizer: Path
    out: Path
    packed: bool = False
    """Whether `tokens` holds packed conversations (`llm.data.packed`), not token shards."""
    start: Path | None = None
    """A sealed model whose weights training starts from, in place of those that are drawn or of `config.init_from`."""
    branch: Path | None = None
    """The branch point of that model whose state training starts from."""
    keep_optimizer: bool = False
    """Whether that is what the optimizer kept, too."""
    samples_before: int = 0
    """Sequences that come before the first that is read."""
    lora: Lora | None = None
    """Train adapters of this kind only."""
    last_blocks: int | None = None
    """Train so many of the last blocks only, with the norm and the head behind them; None: all."""
    objective: Objective = NEXT_TOKEN
    """The loss."""
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
    def data(self) -> Corpus | Packed:
        """The text or the conversations that are read."""
        if not self.packed:
            return self.corpus
        return Packed(self.tokens, seed=self.config.seed, mixture=self.config.mix, units=self.objective.units)

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


def as_begun(job: Job) -> Job:
    """Return ``job`` with an automatic micro-batch pinned to that of its newest checkpoint, where it fits: then the
    bits that follow are those of an undisturbed run. And, where the ranks start here, with what they compute with.

    Raises:
        UserError: that checkpoint was made in another precision; something that is asked for cannot run here.
    """
    newest = next(iter(checkpoint.complete(job.checkpoints)), None)
    if newest is not None:
        made, now = newest.setup, job.config.runtime
        alike = (made.ranks, made.sequence_parallel) == (now.ranks, now.sequence_parallel)
        if now.micro_batch == "auto" and alike:
            runtime = now.model_copy(update={"micro_batch": made.micro_batch})
            job = job.model_copy(update={"config": job.config.model_copy(update={"runtime": runtime})})
    if job.config.runtime.launcher != "local":
        return job  # its ranks see for themselves: what they compute with is not known here
    job = job.resolve()
    if newest is not None:
        checkpoint.require_same_training(newest, job.setup)
    return job


def train(job: Job, context: StageContext) -> None:
    """Have the ranks of a job train, on this machine or by a batch system."""
    runtime = job.config.runtime
    for line in describe_resolved(job.resolved) if job.resolved else ():
        context.note(line)
    if job.resolved and job.resolved.device == "cpu":
        context.note(remark())
    context.launch(
        "llm.training.trainer",
        job.write(),
        runtime.ranks,
        events=job.events,
        logs=job.out / "logs",
        grace_seconds=runtime.grace_seconds,
        batch=None if runtime.launcher == "local" else runtime.slurm,
    )


def describe_resolved(resolved: Resolved) -> list[str]:
    """Return lines for a person: what the ranks compute with, and why."""
    lines = [
        f"precision {resolved.precision}: {resolved.precision_reason}",
        f"attention {resolved.attention}: {resolved.attention_reason}",
    ]
    products = f"matrix products by {resolved.matmul}: {resolved.matmul_reason}"
    return [*lines, products] if resolved.device == "cpu" else lines
