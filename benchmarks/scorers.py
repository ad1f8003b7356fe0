"""Contestants of `benchmarks.score`: each scores the same items; it returns sum and number of tokens of each option."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import Work
from llm.score.prompts import COUNTED, Kind, Prompt, draw_shots, render

SEED = 1234
"""Seed of the shots, as nanochat's."""


def prompts_of(path: str, kind: Kind, delimiter: str, *, shots: int, count: int) -> list[Prompt]:
    """Render the first ``count`` items of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    return [
        render(kind, items[place], draw_shots(items, place, shots, SEED), delimiter) for place in range(count)
    ]


def ours(*, model: str, path: str, kind: Kind, delimiter: str, shots: int, count: int) -> Work:
    """llmill's scorer."""
    from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
    from llm.model.layouts import load_folder
    from llm.score.encode import encode
    from llm.score.replicas import Replicas
    from llm.score.scorer import score
    from llm.score.task import first_token

    loaded, tokenizer = load_folder(Path(model)), load_tokenizer(Path(model))
    first = first_token(tokenizer, Path(model))
    prompts = prompts_of(path, kind, delimiter, shots=shots, count=count)

    def work() -> list[list[tuple[float, int]]]:
        encoded = [encode(prompt, tokenizer, first, loaded.config.context) for prompt in prompts]
        found = dict(score(Replicas([loaded]), encoded))
        return [
            [(float(one.nats.sum()), len(one.nats)) for one in found[place]] for place in range(len(prompts))
        ]

    return work


def plain_loop(*, model: str, path: str, kind: Kind, delimiter: str, shots: int, count: int) -> Work:
    """One item after the other through `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    prompts = prompts_of(path, kind, delimiter, shots=shots, count=count)

    @torch.inference_mode()
    def work() -> list[list[tuple[float, int]]]:
        found = []
        for prompt in prompts:
            rows = [
                [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
                for text in prompt.texts
            ]
            starts = starts_of(rows, at_the_end=COUNTED[kind] == "the common end")
            longest = max(map(len, rows))
            padded = torch.tensor([[*row, *[tokenizer.bos_token_id] * (longest - len(row))] for row in rows])
            logs = loaded(padded).logits.float().log_softmax(-1)
            found.append(
                [
                    (
                        -logs[number, range(start - 1, len(row) - 1), row[start:]].sum().item(),
                        len(row) - start,
                    )
                    for number, (row, start) in enumerate(zip(rows, starts, strict=True))
                ]
            )
        return found

    return work


def starts_of(rows: list[list[int]], *, at_the_end: bool) -> list[int]:
    """Find where the options of an item begin to count: as nanochat's core_eval does."""
    shortest, same = min(map(len, rows)), 0
    while same < shortest and len({row[-1 - same if at_the_end else same] for row in rows}) == 1:
        same += 1
    return [len(row) - same if at_the_end else same for row in rows]
