"""Contestants: models of some shapes, trained by our trainer, by a bare loop around our model, and by a plain loop
around `transformers`' Llama."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.tokenize.flat import Vocabulary, write_flat
from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.pretrain.config import PretrainConfig
from llm.training.job import Job
from llm.training.probe import Clock, collectives_timed

PART_STEPS = 3
"""Steps whose parts are timed, apart from those that count: waiting for a GPU between parts costs time."""
WARM_UP = 2
"""Steps that do not count: caches fill, and the allocator takes its memory."""


@dataclass(frozen=True)
class Shape:
    """A model and a batch to measure with."""

    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int
    batch_sequences: int
    tie_embeddings: bool = False

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            context=self.context,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tie_embeddings,
        )


SHAPES = {
    "tiny": Shape(
        layers=2, width=64, heads=2, context=64, vocab_size=512, batch_sequences=8, tie_embeddings=True
    ),
    "7M": Shape(
        layers=4, width=256, heads=4, context=256, vocab_size=16_384, batch_sequences=16, tie_embeddings=True
    ),
    "124M": Shape(layers=12, width=768, heads=12, context=1024, vocab_size=32_768, batch_sequences=64),
    "350M": Shape(layers=24, width=1024, heads=16, context=2048, vocab_size=32_768, batch_sequences=32),
    "1B": Shape(layers=16, width=2048, heads=16, context=2048, vocab_size=32_768, batch_sequences=32),
}
"""Shapes by name: about so many parameters. 7M is for CPUs, the larger ones for a GPU each, tiny for tests."""

ATTENTION = {
    "cpu": Shape(layers=1, width=256, heads=4, context=1024, vocab_size=64, batch_sequences=2),
    "cuda": Shape(layers=1, width=2048, heads=16, context=8192, vocab_size=64, batch_sequences=2),
}
"""Shapes whose heads, their width and the tokens of a batch are those of the race between attention back ends."""


@dataclass(frozen=True)
class Contestant:
    """One row of a table."""

    name: str
    kind: str
    """Work that runs: a key of `WORK`."""
    shape: Shape
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of our trainer: fields of `PretrainConfig` (``runtime`` among them)."""
    allocator: bool = True
    """Whether it starts in the environment that our launcher sets (`rank_environment`), or as a user would."""
    ranks: int = 1


def train_ours(job: Contestant, steps: int) -> dict[str, Any]:
    """Steps of our trainer: loader, engine, events and all."""
    from llm.training.engine import start_ranks
    from llm.training.trainer import Trainer

    rank, ranks = start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(make_job(job, Path(folder), steps + PART_STEPS), rank, ranks)
        with trainer.loader:
            return timed(trainer.train_step, trainer.engine.clock, steps)


def timed(train_step: Callable[[int], object], clock: Clock, steps: int) -> dict[str, Any]:
    """Seconds of each of ``steps`` steps, and then of the parts of a few more, in which the clock runs."""
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        train_step(step)
        seconds.append(time.perf_counter() - start)
    clock.running = True
    with collectives_timed(clock):
        for step in range(steps, steps + PART_STEPS):
            train_step(step)
    return {"seconds": seconds, "parts": {part: total / PART_STEPS for part, total in clock.seconds.items()}}


def make_job(job: Contestant, folder: Path, steps: int) -> Job:
    """A training of ``steps`` steps on random tokens."""
    shape, config = job.shape, config_of(job, steps)
    (folder / "scratch").mkdir()
    for split, windows in (("train", 64 * shape.batch_sequences), ("val", 1)):
        with write_flat(folder / "tokens", f"{split}-00000", Vocabulary("", shape.vocab_size), end=0) as flat:
            document = np.append(random_tokens(shape, windows), np.uint16(0))
            flat.add(pa.array(["random/text"]), pa.ListArray.from_arrays([0, len(document)], document))
    return Job(
        config=config,
        model=shape.model,
        tokens=folder / "tokens",
        tokenizer=write_tokenizer(shape.vocab_size, folder),
        out=folder,
    ).resolve()


def config_of(job: Contestant, steps: int) -> PretrainConfig:
    """Return our trainer's settings for so many steps."""
    batch_tokens = job.shape.batch_sequences * job.shape.context
    return PretrainConfig.model_validate(
        {
            "model": job.shape.model.model_dump(exclude={"vocab_size", "labels"}),
            "batch_tokens": batch_tokens,
            "tokens": steps * batch_tokens,
            **job.settings,
        }
    ).resolve()


def write_tokenizer(vocab_size: int, folder: Path) -> Path:
    """A tokenizer with so many entries that mean nothing."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocabulary = {END_OF_TEXT: 0, **{f"entry {id}": id for id in range(1, vocab_size)}}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.add_special_tokens([END_OF_TEXT])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder / "tokenizer"


def random_tokens(shape: Shape, windows: int) -> NDArray[np.uint16]:
    """Tokens of so many windows, and the one after the last, from a fixed seed."""
    count = windows * shape.context + 1
    return np.random.default_rng(0).integers(1, shape.vocab_size, count, dtype=np.uint16)


def train_plain(job: Contestant, steps: int) -> dict[str, Any]:
    """The same model and optimizer as ours in a bare loop: what is left is what DeepSpeed and our loop cost."""
    from llm.training.optimizer import Optimizer, parameter_groups

    resolved = config_of(job, steps).wanted.resolve()
    model = Transformer(job.shape.model, back_end=resolved.attention, matmul=resolved.matmul)
    products = torch.bfloat16 if resolved.precision == "bf16" else torch.float32
    optimizer = Optimizer(parameter_groups(model, resolved.optimizer), resolved.optimizer, products)

    def loss(rows: Tensor) -> Tensor:
        return model(rows[:, :-1], rows[:, 1:])

    return bare_loop(job, model, optimizer, loss, steps, micro=resolved.micro_batch)


def train_transformers(job: Contestant, steps: int) -> dict[str, Any]:
    """`transformers`' Llama with PyTorch's AdamW, as its documentation has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, model = job.shape, job.shape.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=model.hidden_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=shape.tie_embeddings,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(llama.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def loss(rows: Tensor) -> Tensor:
        targets = rows[:, 1:].contiguous()
        return llama(input_ids=rows[:, :-1], labels=targets, shift_labels=targets).loss

    return bare_loop(
        job, llama, optimizer, loss, steps, micro=job.settings.get("runtime", {}).get("micro_batch")
    )


def bare_loop(
    job: Contestant,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    steps: int,
    micro: int | None,
) -> dict[str, Any]:
    """Steps over random windows in memory, each in micro-batches of ``micro`` windows, or whole."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = job.shape
    model.to(device).train()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=job.settings.get("precision") == "bf16")
    tokens = torch.from_numpy(random_tokens(shape, windows=64 * shape.batch_sequences).astype(np.int64))
    rows = tokens.unfold(0, shape.context + 1, shape.context)
    generator = torch.Generator().manual_seed(0)
    micro = micro or shape.batch_sequences
    clock = Clock()

    def train_step(_: int) -> None:
        chosen = torch.randperm(len(rows), generator=generator)[: shape.batch_sequences]
        loss = torch.zeros(())
        clock.start()
        for part in chosen.split(micro):
            batch = rows[part].to(device)
            clock.lap("data")
            with autocast:
                loss = loss_of(batch) * (len(part) / shape.batch_sequences)
            clock.lap("forward")
            loss.backward()
            clock.lap("backward")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        clock.lap("optimizer")

    return timed(train_step, clock, steps)


WORK: dict[str, Callable[[Contestant, int], dict[str, Any]]] = {
    "llmill": train_ours,
    "plain": train_plain,
    "transformers": train_transformers,
}
