"""Contestants of `benchmarks.finetune`: each trains the same model once on the same conversations (llmill on a few
less, which it holds out); it returns the tokens of these and the loss of its last step.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Work

STEP = 16
"""Conversations a step of those who don't pack."""
LR = 5e-5


def rows_of(data: str, count: int) -> list[dict[str, Any]]:
    """Return the first conversations of a file, as lists of messages."""
    from data_pipeline.core.pinned_files import pin
    from llm.chat.conversations import read_conversations

    [file] = pin([Path(data)], "data")
    found = [row for row in read_conversations(file) if not row.rejected][:count]
    return [{"messages": [dict(one) for one in row.messages]} for row in found]


def ours(*, model: str, data: str, count: int, context: int, precision: str, packing: bool) -> Work:
    """llmill's trainer: loader, engine, events and all."""
    from data_pipeline.stage import LocalContext
    from llm.chat.template import Chat
    from llm.finetune.config import FinetuneConfig
    from llm.finetune.reader import Conversations
    from llm.finetune.training import read_rows, rows_folder
    from llm.model.layouts import load_folder
    from llm.model.transformer import save_model
    from llm.training.engine import start_ranks
    from llm.training.job import Job
    from llm.training.trainer import Trainer

    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(alone)
    folder = Path(tempfile.mkdtemp())
    loaded = load_folder(Path(model))
    weights = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    (folder / "start").mkdir()
    save_model(loaded.config, weights, folder / "start")
    given = folder / "given.jsonl"
    given.write_text(
        "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows_of(data, count)), encoding="utf-8"
    )
    config = FinetuneConfig.model_validate(
        {
            "data": {"path": given}, "context": context, "packing": packing, "epochs": 1, "lr": LR,
            "batch_rows": 4 if packing else STEP, "held_out": 0.05, "precision": precision,
        }
    ).resolve()  # fmt: skip
    read = read_rows(config, Conversations(Chat(Path(model))), context, folder / "out", LocalContext())
    job = Job(
        config=config.training(loaded.config, read.rows["train"]), model=loaded.config,
        tokens=rows_folder(folder / "out"), tokenizer=Path(model), out=folder / "out", packed=True,
        start=folder / "start",
    ).resolve()  # fmt: skip
    del loaded, weights
    trainer = Trainer(job, *start_ranks())

    def work() -> dict[str, float]:
        with trainer.loader:
            for step in range(job.config.steps):
                trainer.train_step(step)
        return {"tokens": read.tokens, "loss": trainer.history["step"][-1]["loss"], "steps": job.config.steps}

    return work


def plain_loop(*, model: str, data: str, count: int, context: int, precision: str) -> Work:
    """A loop around `transformers` as its documentation has it: so many conversations a step, filled up to the longest;
    fp32 weights, products in ``precision``, PyTorch's fused AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    from llm.chat.template import Chat

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    chat = Chat(Path(model))
    given = [chat.encode(row["messages"]) for row in rows_of(data, count)]
    given = [one._replace(tokens=one.tokens[:context], counted=one.counted[:context]) for one in given]
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=LR, fused=True)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(0)).tolist()

    def step(batch: list[Any]) -> float:
        longest = max(len(one.tokens) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, one in enumerate(batch):
            size, tokens = len(one.tokens), torch.tensor(one.tokens)
            ids[row, :size], mask[row, :size] = tokens, 1
            labels[row, :size] = torch.where(torch.tensor(one.counted), tokens, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loaded(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def work() -> dict[str, float]:
        losses = [step([given[n] for n in order[at : at + STEP]]) for at in range(0, len(order), STEP)]
        return {
            "tokens": sum(len(one.tokens) - 1 for one in given), "loss": losses[-1], "steps": len(losses)
        }  # fmt: skip

    return work


def trl(*, model: str, data: str, count: int, context: int, precision: str, packing: bool) -> Work:
    """TRL's `SFTTrainer`, the loss on answers only; its packing lets conversations of a row see each other where there
    is no flash attention."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows_of(data, count)
    ]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, learning_rate=LR, max_length=context, packing=packing,
        per_device_train_batch_size=4 if packing else STEP, bf16=precision == "bf16", use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", gradient_checkpointing=False, optim="adamw_torch_fused",
        dataloader_num_workers=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    tokens = sum(
        len(tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=False)) - 1
        for row in rows
    )

    def work() -> dict[str, float]:
        done = trainer.train()
        return {"tokens": tokens, "loss": done.training_loss, "steps": done.global_step}

    return work
