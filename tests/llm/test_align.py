"""Training on preferences: forms of rows, the losses by hand, what it starts from, whole trainings, and kills."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from disturbed import Stage
from tuned import QUESTIONS, payload, written

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from data_pipeline.stage import LocalContext
from llm.align.config import AlignConfig
from llm.align.pairs import Pairs
from llm.align.reference import answer_nats, row_nats
from llm.align.stage import align
from llm.chat.template import Chat
from llm.data.packed import Conversation, PackedRows, lay_out, pack
from llm.finetune.config import DataFile, FinetuneConfig
from llm.finetune.stage import finetune
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, load_model
from llm.training.objective import Preferences


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Pairs enough that some are held out."""
    rows = [
        {
            "instruction": f"{asked} ({number})",
            "chosen": f"{answer} {number}",
            "rejected": f"#{answer[::-1]}!",
        }
        for number in range(12)
        for asked, answer in QUESTIONS
    ]
    return written(tmp_path / "given.jsonl", rows)


def config(given: Path, **fields: Any) -> AlignConfig:
    runtime = {
        "checkpoint_every": 2,
        "validation": {"every": 3, "tokens": 65536},
        **fields.pop("runtime", {}),
    }
    return AlignConfig.model_validate(
        {
            "data": {"path": given},
            "context": 256,
            "batch_rows": 4,
            "lr": 1e-3,
            "beta": 0.5,
            "precision": "fp32",
            "answers": 2,
            "answer_tokens": 5,
            "held_out": 0.2,
            "runtime": runtime,
            **fields,
        }
    )


def trained(config: AlignConfig, inputs: dict[str, Path], out: Path) -> dict[str, float]:
    return dict(align(config, inputs, out, LocalContext(launcher=forks.launch)))


def test_every_form_of_a_row_is_read_and_what_is_none_is_rejected_with_why(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    asked, good, bad = "日本の首都は？ 🗼", "東京です。", "ไม่รู้"
    begun = [{"role": "system", "content": "短く。"}, user("مرحبا"), assistant("أهلا"), user(asked)]
    forms: list[Any] = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"instruction": asked, "input": "", "output": "x", "chosen": good, "rejected": bad},
        {"prompt": [user(asked)], "chosen": [assistant(good)], "rejected": [assistant(bad)]},
        {"chosen": [user(asked), assistant(good)], "rejected": [user(asked), assistant(bad)]},
        {
            "prompt": asked,
            "chosen": [user(asked), assistant(good)],
            "rejected": [user(asked), assistant(bad)],
        },
        {"chosen": [*begun, assistant(good)], "rejected": [*begun, assistant(bad)]},
    ]
    wrong: dict[str, Any] = {
        "no JSON object": 3,
        "without chosen and rejected": {"prompt": asked, "chosen": good},
        "answers to no question": {"chosen": good, "rejected": bad},
        "chosen and rejected are the same": {"prompt": asked, "chosen": good, "rejected": good},
        "not the same question of both": {
            "chosen": [user("a"), user(asked), assistant(good)], "rejected": [user("a"), assistant(bad)]
        },
        "empty answer": {"prompt": asked, "chosen": " ", "rejected": bad},
        "other than text": {"prompt": asked, "chosen": 3, "rejected": bad},
        "spells a special token": {"prompt": asked, "chosen": "<|reserved_1|>", "rejected": bad},
        "unknown role": {"prompt": [{"role": "alien", "content": "x"}], "chosen": good, "rejected": bad},
    }  # fmt: skip
    [file] = pin([written(tmp_path / "rows.jsonl", [*forms, *wrong.values()])], "data")
    chat = Chat(corpus["tokenizer"])
    reader = Pairs(chat)
    items = list(reader.items(DataFile(path=file.path), file))
    assert [item.rejected for item in items] == [""] * len(forms) + list(wrong)
    for item in items[:5]:
        assert item.whole == {
            "prompt": [user(asked)],
            "chosen": [assistant(good)],
            "rejected": [assistant(bad)],
        }
    begin, end = "<|reserved_0|>", "<|reserved_1|>"
    shown = reader.show(items[5])
    assert shown.count("⟦") == shown.count("⟧") == 2, "an earlier answer does not count"
    assert f"{begin}assistant\nأهلا{end}" in shown
    assert f"⟦{good}{end}⟧" in shown
    assert f"⟦{bad}{end}⟧" in shown


def pairs(seed: int, count: int) -> list[Conversation]:
    """Made-up pairs, chosen and rejected in turn, in which what counts begins anywhere."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = chance.integers(1, 490, chance.integers(1, 6)).tolist()
        for _ in ("chosen", "rejected"):
            answer = chance.integers(1, 490, chance.integers(1, 9)).tolist()
            made.append(Conversation([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)))
    return made


def log_likelihood(model: Transformer, conversation: Conversation) -> torch.Tensor:
    """By arithmetic, in float64: the sum over what counts."""
    tokens, counted = conversation
    logs = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(dim=-1)
    found = [logs[at, tokens[at + 1]] for at in range(len(tokens) - 1) if counted[at + 1]]
    return torch.stack(found).sum()


@pytest.mark.parametrize(
    "objective",
    [
        Preferences(beta=0.3),
        Preferences(beta=0.3, label_smoothing=0.2),
        Preferences(by="ipo", beta=0.3),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradient_of_a_step_are_those_of_each_pair_by_itself(
    objective: Preferences, ranks: int, tiny: Any
) -> None:
    shape: ModelConfig = tiny(context=24, init_std=0.2)
    given = pairs(0, 24)
    lengths = [a.length + b.length for a, b in zip(given[::2], given[1::2], strict=True)]
    rows = pack(lengths, 24)
    rows = rows[: len(rows) // 4 * 4]
    numbered = [[2 * number + part for number in row for part in (0, 1)] for row in rows]
    assert len({len(row) for row in rows}) > 1, "rows of unlike many pairs"
    laid = lay_out(given, numbered, 24)
    start = Transformer(shape, seed=5)
    model = Transformer(shape, seed=1).train()
    nats = row_nats(start, laid, "fp32", lambda _: None)
    source = PackedRows([laid], objective.units, [nats])
    everyone = np.arange(len(rows), dtype=np.uint64)
    gradients, total = None, 0.0
    for rank in range(ranks):
        mine = everyone.reshape(ranks, -1)[rank]
        micro = [source.take(mine[at : at + 2]) for at in range(0, len(mine), 2)]
        for batch in source.weighed(micro, mine, everyone):
            outputs = model(
                batch.tokens_BT, batch.targets_BT, "none", batch.documents_BT,
                positions_BT=batch.positions_BT, counted_BT=batch.counted_BT,
            )  # fmt: skip
            scaled = objective.loss(outputs, batch) * batch.weight / (len(micro) * ranks)
            total += float(scaled.detach())
            found = torch.autograd.grad(scaled, list(model.parameters()))
            gradients = found if gradients is None else [a + b for a, b in zip(gradients, found, strict=True)]

    exact, reference = Transformer(shape, seed=1).double(), Transformer(shape, seed=5).double()
    losses = []
    for chosen, rejected in ((given[2 * number], given[2 * number + 1]) for row in rows for number in row):
        with torch.no_grad():
            before = log_likelihood(reference, chosen) - log_likelihood(reference, rejected)
        margin = log_likelihood(exact, chosen) - log_likelihood(exact, rejected) - before
        likely = 1 / (1 + torch.exp(-objective.beta * margin))
        e = objective.label_smoothing
        dpo = -(1 - e) * torch.log(likely) - e * torch.log(1 - likely)
        losses.append(dpo if objective.by == "dpo" else (margin - 1 / (2 * objective.beta)) ** 2)
    wanted = torch.stack(losses).mean()
    assert total == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert gradients is not None
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, list(exact.parameters())), strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=2e-3, atol=2e-6 * float(wanted.detach()) + 1e-6
        )


def test_a_model_comes_to_prefer_and_says_what_became_of_each_row(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    with given.open("a", encoding="utf-8") as file:
        asked, answer = QUESTIONS[0]
        again = {"instruction": f"{asked} (0)", "chosen": f"{answer} 0", "rejected": f"#{answer[::-1]}!"}
        long = {"prompt": "long", "chosen": "日本 " * 100, "rejected": "no " * 100}
        file.write("".join(json.dumps(row) + "\n" for row in (again, {"text": "no pair"}, long)))
    out = tmp_path / "out"
    metrics = trained(config(given, epochs=6.0), inputs, out)
    checks = pq.read_table(out / "validation.parquet").to_pylist()
    assert checks[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "it starts from the reference"
    assert metrics["val_loss"] < 0.5 * math.log(2)
    assert metrics["accuracy"] > 0.9
    assert metrics["accuracy_low"] < metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["chosen_reward"] > metrics["rejected_reward"]
    assert metrics["margin"] == pytest.approx(metrics["val_margin"], rel=1e-3)
    assert metrics["pairs"] + metrics["held_out_pairs"] == 12 * len(QUESTIONS) + 1
    assert metrics["rejected/without chosen and rejected"] == 1
    assert metrics["dropped/the same again"] == 1
    assert metrics["cut/longer than a row"] == 1
    reader = Pairs(Chat(inputs["tokenizer"]))
    models = {"reference": load_model(inputs["model"]), "model": load_model(out)}
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert len(rows) == metrics["held_out_pairs"]
    for row in rows[:3]:
        asked = json.loads(row["prompt"])
        for answer in ("chosen", "rejected"):
            whole = reader.chat.encode([*asked, *json.loads(row[answer])], first=len(asked))
            for name, model in models.items():
                nats = -float(log_likelihood(model.double(), whole).detach())
                assert row[f"{answer}_{name}_nats"] == pytest.approx(nats, rel=1e-4)
    answers = pq.read_table(out / "answers.parquet").to_pylist()
    assert [row["after_tokens"] <= 5 for row in answers] == [True, True]
    assert metrics["divergence"] == pytest.approx(np.mean([row["log_ratio"] for row in answers]))
    assert "⟦" in (out / "report.md").read_text(encoding="utf-8")


def test_nats_are_those_of_each_answer_by_itself(inputs: dict[str, Path]) -> None:
    model, given = load_model(inputs["model"]), pairs(3, 6)
    for nats, one in zip(answer_nats(model, given), given, strict=True):
        assert nats == pytest.approx(-float(log_likelihood(model, one).detach()), rel=1e-4)


@pytest.mark.long
def test_ranks_and_zero_stages_train_alike(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    losses: dict[str, Any] = {}
    for name, runtime in {
        "one": {"micro_batch": 4}, "zero 0": {"ranks": 2, "micro_batch": 1}, "zero 3": {"ranks": 2, "zero_stage": 3}
    }.items():  # fmt: skip
        trained(config(given, runtime=runtime, answers=0), inputs, tmp_path / name)
        losses[name] = pq.read_table(tmp_path / name / "losses.parquet")["loss"].to_numpy()
        checks = pq.read_table(tmp_path / name / "validation.parquet")["margin"].to_numpy()
        np.testing.assert_allclose(checks, losses.setdefault("checks", checks), rtol=1e-2, atol=1e-4)
    for name in ("zero 0", "zero 3"):
        np.testing.assert_allclose(losses[name], losses["one"], rtol=1e-3, atol=1e-4)


def test_what_the_reference_says_is_sealed_and_computed_once(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "align"
    kept: dict[str, dict[str, bytes]] = {}

    def notes(name: str, **fields: Any) -> list[str]:
        context = LocalContext(launcher=forks.launch)
        align(config(given, answers=0, **fields), inputs, store / name, context)
        kept[name] = {path.name: path.read_bytes() for path in (store / name / "reference").iterdir()}
        return [note for note in context.notes if "under the reference" in note]

    assert notes("first.partial") == []
    assert notes("second") == [], "a step that has not ended may still change"
    assert notes("third", beta=0.1) == [
        f"log-probabilities of {split}-000 under the reference: those of second" for split in ("train", "val")
    ]
    assert len(kept["second"]) == 2
    assert kept["third"] == kept["second"]
    assert notes("other", held_out=0.3) == [], "other rows"
    assert not kept["other"].keys() & kept["second"].keys()
    losses = [
        pq.read_table(store / name / "losses.parquet")["loss"][0].as_py() for name in ("second", "third")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "of the first step, in which both models are one"


def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    wanted = config(given, epochs=8.0, lora={"rank": 2})  # long enough to be killed in the middle of it
    trained(wanted, inputs, tmp_path / "whole")
    assert (tmp_path / "whole" / "adapter" / "adapter_config.json").exists()
    stage = Stage(wanted, inputs, tmp_path / "killed", stage="align")
    stage.wait_for("checkpoint", 2)
    stage.kill()
    trained(wanted, inputs, tmp_path / "killed")
    assert payload(tmp_path / "killed") == payload(tmp_path / "whole")


def test_it_goes_on_with_the_template_that_the_model_was_trained_with(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}<|reserved_1|>\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    rows = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(60)]
    first = FinetuneConfig.model_validate(
        {
            "data": {"path": written(tmp_path / "rows.jsonl", rows)}, "template": template, "context": 64,
            "batch_rows": 4, "precision": "fp32", "answers": 0, "held_out": 0.2,
        }
    )  # fmt: skip
    finetune(first, inputs, tmp_path / "tuned", LocalContext(launcher=forks.launch))
    trained(config(given, answers=0), {**inputs, "model": tmp_path / "tuned"}, tmp_path / "aligned")
    assert (tmp_path / "aligned" / "chat_template.jinja").read_text() == template.read_text()
    assert "### user:" in (tmp_path / "aligned" / "report.md").read_text(encoding="utf-8")


def test_mistakes_are_said(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    few = written(tmp_path / "few.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(
        UserError, match=r"align.data: there are no pairs to train on \(1 chosen and rejected are"
    ):
        trained(config(few), inputs, tmp_path / "few")
    with pytest.raises(ValueError, match="label_smoothing goes with dpo"):
        config(given, loss="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="the model reads 256 tokens at once"):
        trained(config(given, context=320), inputs, tmp_path / "long")
