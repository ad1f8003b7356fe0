"""Finetuning on conversations: forms of rows, the mask, packing, the loss by hand, whole trainings, and kills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disturbed import Stage
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuned import QUESTIONS, payload, written

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
from llm.chat.conversations import read_conversations
from llm.chat.template import CHATML, FILE, Chat
from llm.data.loader import Loader, RankSlice
from llm.data.packed import IGNORED, Conversation, PackedRows, lay_out, pack
from llm.export.config import ExportConfig
from llm.export.stage import export, write_loadable
from llm.finetune.config import FinetuneConfig
from llm.finetune.stage import finetune
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, load_model

CHAT = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for asked, answer in QUESTIONS
]
LONG = [{"role": "system", "content": "Be brief. 短く。"}, *CHAT[0], *CHAT[1]]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Questions enough that some are held out."""
    rows = [
        {"instruction": f"{asked} ({number})", "input": "", "output": f"{answer} {number}"}
        for number in range(12)
        for asked, answer in QUESTIONS
    ]
    return written(tmp_path / "given.jsonl", rows)


def config(given: Path, **fields: Any) -> FinetuneConfig:
    runtime = {"checkpoint_every": 2, "validation": {"every": 3, "tokens": 4096}, **fields.pop("runtime", {})}
    return FinetuneConfig.model_validate(
        {
            "data": {"path": given},
            "context": 128,
            "epochs": 1.0,
            "batch_rows": 8,
            "lr": 3e-3,
            "precision": "fp32",
            "answers": 2,
            "answer_tokens": 5,
            "held_out": 0.2,
            "runtime": runtime,
            **fields,
        }
    )


def test_every_form_of_a_row_is_read_and_what_is_none_is_rejected_with_why(tmp_path: Path) -> None:
    asked, answer = QUESTIONS[1]
    forms: list[Any] = [
        {"messages": CHAT[1]},
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]},
        {"prompt": asked, "completion": answer},
        {"prompt": CHAT[1][:1], "completion": CHAT[1][1:]},
        {"instruction": asked, "input": "", "output": answer},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": asked}]},
                *CHAT[1][1:],
                CHAT[2][0],
            ]
        },
    ]
    wrong: dict[str, Any] = {
        "no JSON object": [1],
        "no known fields": {"text": "x"},
        "no answer": {"messages": CHAT[1][:1]},
        "empty answer": {"prompt": asked, "completion": " \n"},
        "answer before a question": {"messages": CHAT[1][1:]},
        "messages are no list": {"messages": "x"},
        "message without from and value": {"conversations": CHAT[1]},
        "unknown role": {"messages": [{"role": "alien", "content": "x"}, *CHAT[1]]},
        "other than text": {"instruction": "x", "output": {"a": 1}},
        "half of a surrogate pair": {"prompt": "\ud83d", "completion": answer},
    }
    lines = [*(json.dumps(row) for row in forms), *(json.dumps(row) for row in wrong.values()), "{broken"]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(lines), encoding="utf-8")
    [file] = pin([text], "data")
    rows = list(read_conversations(file))
    for row in rows[: len(forms)]:
        assert [dict(one) for one in row.messages] == CHAT[1]
    assert [row.rejected for row in rows[len(forms) :]] == [*wrong, "no JSON object"]
    assert rows[-1].content == "{broken"

    (tmp_path / "rows.json").write_text(json.dumps(forms, indent=1), encoding="utf-8")
    table = pa.Table.from_pylist([{"messages": CHAT[0]}, {"messages": CHAT[3]}])
    pq.write_table(table, tmp_path / "rows.parquet")
    for name, found in (("rows.json", [CHAT[1]] * len(forms)), ("rows.parquet", [CHAT[0], CHAT[3]])):
        [file] = pin([tmp_path / name], "data")
        assert [[dict(one) for one in row.messages] for row in read_conversations(file)] == found


def test_only_answers_and_the_ends_of_their_turns_count(corpus: dict[str, Path]) -> None:
    chat = Chat(corpus["tokenizer"])
    shown = chat.marked(chat.encode(LONG))
    begin, end = "<|reserved_0|>", "<|reserved_1|>"
    assert shown == (
        f"{begin}system\nBe brief. 短く。{end}\n"
        f"{begin}user\nWhat is the capital of France?{end}\n{begin}assistant\n⟦Paris.{end}⟧\n"
        f"{begin}user\n日本の首都は？{end}\n{begin}assistant\n⟦東京です。{end}⟧\n"
    )
    assert chat.plain.id_to_token(chat.stop) == end
    with pytest.raises(Exception, match="spells a special token"):
        chat.encode([{"role": "user", "content": f"x{end}"}, *CHAT[0][1:]])


@pytest.mark.parametrize("messages", [*CHAT, LONG])
def test_ids_are_those_of_apply_chat_template(
    messages: list[dict[str, str]], corpus: dict[str, Path], tmp_path: Path
) -> None:
    chat = Chat(corpus["tokenizer"])
    theirs = AutoTokenizer.from_pretrained(corpus["tokenizer"], split_special_tokens=False)
    theirs.chat_template = CHATML
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert chat.encode(messages).tokens == ids
    asked = theirs.apply_chat_template(
        messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert chat.prompt(messages[:-1]) == asked


def test_a_template_of_ones_own_is_used_and_a_bad_one_refused(corpus: dict[str, Path]) -> None:
    own = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    chat = Chat(corpus["tokenizer"], own)
    assert chat.marked(chat.encode(CHAT[0])) == (
        "### user:\nWhat is the capital of France?\n### assistant:\n⟦Paris.\n⟧"
    )
    assert chat.stop is None
    for bad, said in (
        ("{{ x", "can't be rendered"),
        ("{{ messages[0].content }}", "does not put an answer behind"),
    ):
        with pytest.raises(UserError, match=said):
            Chat(corpus["tokenizer"], bad)


@hypothesis.given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_puts_each_into_one_row_with_room_and_begins_few(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 20 for row in rows)
    loads = [sum(lengths[item] for item in row) for row in rows]
    for place, row in enumerate(rows):
        begun_for = lengths[row[0]]
        assert all(load + begun_for > 20 for load in loads[:place]), "a row is begun where no other has room"
    assert pack(lengths, 20) == rows


def conversations(seed: int, count: int, longest: int) -> list[Conversation]:
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = chance.integers(1, 490, chance.integers(3, longest)).tolist()
        counted = (chance.random(len(tokens)) < 0.5).tolist()
        counted[-1] = True
        made.append(Conversation(tokens, counted))
    return made


def mean_loss(model: Transformer, given: list[Conversation]) -> torch.Tensor:
    """By arithmetic: each conversation by itself, in float64, the mean over all targets that count."""
    nats, total = torch.zeros((), dtype=torch.float64), 0
    for tokens, counted in given:
        logs = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(dim=-1)
        for place, (token, counts) in enumerate(zip(tokens[1:], counted[1:], strict=True)):
            if counts:
                nats, total = nats - logs[place, token], total + 1
    return nats / total


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradient_of_a_step_are_those_of_each_conversation_by_itself(
    positions: str, ranks: int, tiny: Callable[..., ModelConfig]
) -> None:
    shape = tiny(context=24, positions=positions, init_std=0.2)
    given = conversations(0, 30, 20)
    rows = pack([one.length for one in given], 24)
    rows = rows[: len(rows) // 4 * 4]
    source = PackedRows([lay_out(given, rows, 24)])
    given = [given[item] for row in rows for item in row]
    model = Transformer(shape, seed=1).train()
    everyone = np.arange(len(rows), dtype=np.uint64)
    gradients, total = None, 0.0
    for rank in range(ranks):
        mine = everyone.reshape(ranks, -1)[rank]
        micro = [source.take(mine[start : start + 2]) for start in range(0, len(mine), 2)]
        for batch in source.weighed(micro, mine, everyone):
            loss = model(
                batch.tokens_BT, batch.targets_BT, documents_BT=batch.documents_BT,
                positions_BT=batch.positions_BT, counted_BT=batch.counted_BT,
            )  # fmt: skip
            scaled = loss * batch.weight / (len(micro) * ranks)
            total += float(scaled)
            found = torch.autograd.grad(scaled, list(model.parameters()))
            gradients = found if gradients is None else [a + b for a, b in zip(gradients, found, strict=True)]
    exact = Transformer(shape, seed=1).double()
    wanted = mean_loss(exact, given)
    assert total == pytest.approx(float(wanted), rel=1e-5)
    assert gradients is not None
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, list(exact.parameters())), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-6)


def test_a_micro_batch_ends_where_nothing_counts_any_more() -> None:
    given = [Conversation(range(1, size + 2), [True] * (size + 1)) for size in (10, 70, 100, 250)]
    source = PackedRows([lay_out(given, [[0], [1], [2], [3]], 256)])
    everyone = np.arange(4, dtype=np.uint64)

    def lengths(micro: list[NDArray[np.uint64]]) -> list[int]:
        batches = source.weighed([source.take(one) for one in micro], everyone, everyone)
        return [one.tokens_BT.shape[1] for one in batches]

    assert lengths([everyone[at : at + 1] for at in range(4)]) == [16, 80, 112, 256]
    assert lengths([everyone]) == [256]


def test_rows_of_a_micro_batch_are_about_as_long() -> None:
    given = [Conversation(range(1, size + 2), [True] * (size + 1)) for size in (250, 10, 100, 70)]
    source = PackedRows([lay_out(given, [[0], [1], [2], [3]], 256)])
    everyone = np.arange(4, dtype=np.uint64)
    with Loader(source, lambda *_: everyone, lambda _: (0, 4), RankSlice(0, 1, 2), steps=1) as loader:
        batches = loader.micro_batches(0)
    assert [one.tokens_BT.shape[1] for one in batches] == [80, 256]
    assert [int(one.counted_BT.sum()) for one in batches if one.counted_BT is not None] == [80, 350]
    assert sum(one.weight for one in batches) == pytest.approx(2)


def test_rows_hold_what_was_packed(tiny: Callable[..., ModelConfig]) -> None:
    given = conversations(3, 5, 10)
    rows = pack([one.length for one in given], 24)
    laid = lay_out(given, rows, 24)
    batch = PackedRows([laid]).take(np.arange(len(rows)))
    assert batch.positions_BT is not None
    assert batch.counted_BT is not None
    for place, row in enumerate(rows):
        start = 0
        for item in row:
            tokens, counted = given[item]
            here = slice(start, start + len(tokens) - 1)
            assert batch.tokens_BT[place, here].tolist() == list(tokens[:-1])
            assert batch.positions_BT[place, here].tolist() == list(range(len(tokens) - 1))
            assert batch.counted_BT[place, here].tolist() == list(counted[1:])
            start = here.stop
        assert (laid[1, place, start:] == IGNORED).all()


def trained(config: FinetuneConfig, inputs: dict[str, Path], out: Path) -> dict[str, float]:
    return dict(finetune(config, inputs, out, LocalContext(launcher=forks.launch)))


def test_a_model_learns_to_answer_and_says_what_became_of_each_row(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    with given.open("a", encoding="utf-8") as file:
        more = [
            {"instruction": f"{QUESTIONS[0][0]} (0)", "output": f"{QUESTIONS[0][1]} 0"},
            {"text": "no conversation"},
            {"instruction": "long", "output": "日本 " * 200},
        ]
        file.write("".join(json.dumps(row) + "\n" for row in more) + "{broken\n")
    out = tmp_path / "out"
    metrics = trained(config(given, epochs=4.0), inputs, out)
    assert metrics["val_loss"] < metrics["val_loss_before"] - 0.3
    assert metrics["conversations"] + metrics["held_out_conversations"] == 12 * len(QUESTIONS) + 1
    assert metrics["rejected/no known fields"] == metrics["rejected/no JSON object"] == 1
    assert metrics["dropped/the same again"] == 1
    assert metrics["cut/longer than a row"] == 1
    assert 0 < metrics["padding"] < 0.2
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (12 * len(QUESTIONS) + 2, "no known fields"),
        (12 * len(QUESTIONS) + 4, "no JSON object"),
    ]
    checks = pq.read_table(out / "validation.parquet").to_pylist()
    assert checks[0]["step"] == 0
    assert load_model(out).config.context == 256
    answers = pq.read_table(out / "answers.parquet").to_pylist()
    assert len(answers) == 2
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "⟦" in report
    assert "Held-out question 2" in report
    assert metrics["padding"] < trained(config(given, packing=False), inputs, tmp_path / "apart")["padding"]


def test_the_exported_folder_writes_conversations_as_training_read_them(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    trained(config(given, answers=0), inputs, tmp_path / "model")
    (tmp_path / "out").mkdir()
    made = {**inputs, "model": tmp_path / "model"}
    export(ExportConfig(name="x"), made, tmp_path / "out", LocalContext())
    theirs, chat = AutoTokenizer.from_pretrained(tmp_path / "out"), Chat(inputs["tokenizer"])
    for messages in [*CHAT, LONG]:
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == chat.encode(messages).tokens
    described = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert described["eos_token_id"] == [chat.stop, theirs.eos_token_id]
    assert chat.stop != theirs.eos_token_id
    (tmp_path / "base").mkdir()
    export(ExportConfig(name="x"), inputs, tmp_path / "base", LocalContext())
    assert not (tmp_path / "base" / FILE).exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "base").split_special_tokens


def test_ranks_and_zero_stages_train_alike(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    for name, runtime in {
        "one": {"micro_batch": 4},
        "zero 0": {"ranks": 2, "micro_batch": 2},
        "zero 1": {"ranks": 2, "zero_stage": 1},
        "zero 2": {"ranks": 2, "zero_stage": 2},
        "zero 3": {"ranks": 2, "zero_stage": 3},
    }.items():
        trained(config(given, runtime=runtime, answers=0), inputs, tmp_path / name)
        losses[name] = pq.read_table(tmp_path / name / "losses.parquet")["loss"].to_numpy()
        checks = pq.read_table(tmp_path / name / "validation.parquet")["loss"].to_numpy()
        np.testing.assert_allclose(checks, losses.setdefault("checks", checks), rtol=1e-4)
    for stage in range(4):
        np.testing.assert_allclose(losses[f"zero {stage}"], losses["one"], rtol=1e-4)


def loaded_by_transformers(inputs: dict[str, Path], folder: Path) -> Any:
    """The model that training began with, as `transformers` loads it."""
    (folder / "base").mkdir()
    write_loadable(load_model(inputs["model"]), inputs["tokenizer"], folder / "base", "float32")
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_adapters_are_all_that_is_trained_and_peft_reads_them(
    zero_stage: int, given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    lora = {"rank": 3, "alpha": 12.0, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    runtime = {"ranks": 2, "zero_stage": zero_stage, "micro_batch": 2}
    metrics = trained(
        config(given, lora=lora, lr=2e-2, epochs=3.0, runtime=runtime, answers=0), inputs, tmp_path / "out"
    )
    assert metrics["val_loss"] < metrics["val_loss_before"] - 0.1
    base, merged = load_model(inputs["model"]), load_model(tmp_path / "out")
    for (name, before), (_, after) in zip(base.named_parameters(), merged.named_parameters(), strict=True):
        moved = (after - before).detach()
        if name.split(".")[-2] in lora["targets"]:
            singular = torch.linalg.svdvals(moved)
            assert singular[2] > 1e-4, name
            assert singular[3] < 1e-3 * singular[0], name
        else:
            assert not moved.any(), name

    theirs = PeftModel.from_pretrained(loaded_by_transformers(inputs, tmp_path), tmp_path / "out" / "adapter")
    tokens = torch.randint(0, 500, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, merged(tokens)[..., :500], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "targets", [("k_proj", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), ("v_proj", "down_proj")]
)
def test_peft_reads_adapters_of_gpt2(
    targets: tuple[str, ...],
    given: Path,
    corpus: dict[str, Path],
    tiny: Callable[..., ModelConfig],
    saved_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    inputs = {"tokenizer": corpus["tokenizer"], "model": saved_model(tiny(context=160, positions="learned"))}
    lora = {"rank": 2, "alpha": 5.0, "targets": targets}
    metrics = trained(config(given, lora=lora, lr=2e-2, answers=0), inputs, tmp_path / "out")
    assert metrics["val_loss"] < metrics["val_loss_before"]

    base = loaded_by_transformers(inputs, tmp_path)
    tokens = torch.randint(0, 500, (2, 40))
    with torch.inference_mode():
        before = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(tokens).logits
        ours = load_model(tmp_path / "out")(tokens)[..., :500]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (before - ours).abs().max() > 1e-2


def test_adapters_of_matrices_that_are_not_there_are_refused(
    given: Path,
    corpus: dict[str, Path],
    tiny: Callable[..., ModelConfig],
    saved_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    inputs = {"tokenizer": corpus["tokenizer"], "model": saved_model(tiny(context=160, positions="learned"))}
    with pytest.raises(UserError, match="no matrix of this model"):
        trained(config(given, lora={"targets": ["gate_proj"]}), inputs, tmp_path / "none")


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    whole: bool, given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    lora = None if whole else {"rank": 2}
    wanted = config(given, epochs=30.0, lora=lora, answers=0)  # long enough to be killed in the middle of it
    trained(wanted, inputs, tmp_path / "whole")
    stage = Stage(wanted, inputs, tmp_path / "killed", stage="finetune")
    stage.wait_for("checkpoint", 2)
    stage.kill()
    trained(wanted, inputs, tmp_path / "killed")
    assert payload(tmp_path / "killed") == payload(tmp_path / "whole")


def test_several_files_are_mixed_by_their_weights(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    other = written(tmp_path / "other.jsonl", [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(60)])
    data = [{"path": given, "weight": 3.0}, {"path": other, "weight": 1.0, "name": "numbers"}]
    metrics = trained(config(given, data=data, answers=0), inputs, tmp_path / "out")
    assert metrics["conversations"] > 0
    with pytest.raises(ValueError, match="of all files of data, or of none"):
        config(given, data=[data[0], {"path": other}])


def test_mistakes_are_said(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads 256 tokens at once"):
        trained(config(given, context=320), inputs, tmp_path / "long")
    few = written(tmp_path / "few.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(UserError, match=r"no conversations to train on \(1 empty answer"):
        trained(config(few), inputs, tmp_path / "few")
    with pytest.raises(UserError, match="can't be read"):
        config(tmp_path / "nothing.jsonl").resolve()
    scored = {"tasks": [{"name": "x", "path": tmp_path / "nothing.jsonl", "kind": "pairs"}]}
    with pytest.raises(UserError, match="can't be read"):
        config(given, runtime={"validate_on": scored}).resolve()
    folder = tmp_path / "without"
    folder.mkdir()
    tokenizer = json.loads((inputs["tokenizer"] / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match="has no chat template"):
        Chat(folder)
    (folder / FILE).write_text(CHATML, encoding="utf-8")
    assert load_tokenizer(folder).get_vocab_size() == 500


@pytest.mark.long
def test_killed_it_goes_on_with_other_ranks(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    alone = config(given, epochs=8.0, answers=0, lora={"rank": 2})
    trained(alone, inputs, tmp_path / "whole")
    stage = Stage(alone, inputs, tmp_path / "killed", stage="finetune")
    stage.wait_for("checkpoint", 2)
    stage.kill()
    together = config(given, epochs=8.0, answers=0, lora={"rank": 2}, runtime={"ranks": 2, "zero_stage": 3})
    trained(together, inputs, tmp_path / "killed")
    whole, killed = (
        pq.read_table(tmp_path / name / "losses.parquet")["loss"].to_numpy() for name in ("whole", "killed")
    )
    np.testing.assert_allclose(killed, whole, rtol=1e-3)
