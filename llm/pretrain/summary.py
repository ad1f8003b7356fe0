"""Summary of a finished training: headline metrics and a report in Markdown, from the files that the ranks leave."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import duration, table
from data_pipeline.stage import Metrics
from llm.model.config import ModelConfig
from llm.model.transformer import load_model
from llm.pretrain.scoring import MOST_SCORING

if TYPE_CHECKING:
    from llm.pretrain.config import PretrainConfig


def summarise(config: PretrainConfig, out: Path) -> Metrics:
    """Read back what the ranks wrote, write the report, and return the headline metrics."""
    losses = pq.read_table(out / "losses.parquet").to_pylist()
    checks = pq.read_table(out / "validation.parquet").to_pylist()
    model = load_model(out)
    last = losses[-max(1, len(losses) // 50) :]
    reading = json.loads((out / "sources.json").read_text(encoding="utf-8"))
    metrics = {
        "parameters": float(model.parameter_count()),
        "steps": float(len(losses)),
        "tokens": float(losses[-1]["tokens"]),
        "loss": sum(row["loss"] for row in last) / len(last),
        "val_loss": checks[-1]["loss"],
        "val_bits_per_byte": checks[-1]["bits_per_byte"],
        "best_val_bits_per_byte": min(check["bits_per_byte"] for check in checks),
        "epochs": sum(row["read"] for row in reading) / sum(row["windows"] for row in reading),
        **{f"epochs/{row['source']}": row["epochs"] for row in reading if row["source"]},
    }
    skipped = out / "skipped.parquet"
    passed = pq.read_table(skipped).to_pylist() if skipped.exists() else []
    reasons = Counter(fact["reason"] for fact in passed)
    metrics |= {f"skipped/{reason}": float(count) for reason, count in sorted(reasons.items())}
    with atomic_path(out / "report.md") as path:
        path.write_text(
            report(config, model.config, metrics, reading, losses, checks, passed), encoding="utf-8"
        )
    return metrics


def describe_reading(config: PretrainConfig, reading: list[dict[str, Any]]) -> list[str]:
    """Return lines for a person: how much is read of what."""
    head = f"{config.steps:,} steps of {config.batch_tokens:,} tokens"
    if config.mixture is None:
        return [f"{head}: {reading[0]['epochs']:.2f} epochs"]
    total = sum(row["read"] for row in reading)
    return [f"{head}, mixed:"] + [
        f"- {row['source']}: {row['read'] / total:.1%} of the windows, {row['epochs']:.2f} epochs"
        for row in reading
    ]


def describe_scoring(events: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return lines for a person on what was scored while training and what that cost, and whether each is a warning.

    They are no part of the report, which is the same whatever was scored.
    """
    scored = [event for event in events if event["event"] == "scores"]
    if not scored:
        return []
    seconds = sum(event["seconds"] for event in scored)
    share = seconds / max(seconds, seconds_of(events))
    last = ", ".join(f"{name} {value:.4f}" for name, value in scored[-1].items() if "/" in name)
    cost = f"scored {len(scored)} time(s) while training, in {duration(seconds)}: {share:.1%} of its time"
    dear = share > MOST_SCORING
    advice = "; raise pretrain.runtime.validate_on.every, or lower its items" if dear else ""
    return [(f"after step {scored[-1]['step']:,}: {last}", False), (cost + advice, dear)]


def seconds_of(events: list[dict[str, Any]]) -> float:
    """Sum up the time between the first and the last event of each attempt at a training."""
    starts = [place for place, event in enumerate(events) if event["event"] == "start"]
    ends = [*starts[1:], len(events)]
    return math.fsum(
        events[end - 1]["time"] - events[start]["time"] for start, end in zip(starts, ends, strict=True)
    )


def report(
    config: PretrainConfig,
    model: ModelConfig,
    metrics: Metrics,
    reading: list[dict[str, Any]],
    losses: list[dict[str, float]],
    checks: list[dict[str, float]],
    skipped: list[dict[str, Any]],
) -> str:
    """Return the stage's report in Markdown."""
    lines = [
        "# Pretraining",
        "",
        f"{metrics['parameters']:,.0f} parameters ({model.layers} layers, width {model.width}, {model.heads} heads, "
        f"context {model.context}, vocabulary {model.vocab_size}), {metrics['steps']:,.0f} steps of "
        f"{config.batch_tokens:,} tokens in {config.precision}.",
        "",
        *describe_reading(config, reading),
        "",
        f"Training loss over the last steps: {metrics['loss']:.4f} nats a token.",
        "",
    ]
    held_out = [
        (
            check["step"],
            f"{config.tokens_after(int(check['step'])):,}",
            f"{check['loss']:.4f}",
            f"{check['bits_per_byte']:.4f}",
        )
        for check in checks
    ]
    training = [
        (row["step"], f"{row['loss']:.4f}", f"{row['lr']:.3e}", f"{row['grad_norm']:.3f}")
        for row in losses[:: max(1, len(losses) // 20)]
    ]
    tables = [
        table(("step", "tokens", "held-out loss (nats)", "bits per byte"), held_out, ["---:"] * 4),
        table(("step", "training loss", "learning rate", "gradient norm"), training, ["---:"] * 4),
    ]
    if skipped:
        passed = [(fact["step"], fact["reason"], fact["windows"]) for fact in skipped]
        tables.append(
            table(("step", "skipped because", "windows passed over"), passed, ["---:", ":---", "---:"])
        )
    return "\n".join([*lines, *tables])
