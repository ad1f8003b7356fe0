"""Texts with labels: files of all forms, the loss by hand, whole trainings, baselines, exports, and kills."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disturbed import Stage
from peft import PeftModel
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tuned import payload, written

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from data_pipeline.stage import LocalContext
from llm.chat.talk import Speaker
from llm.classify import measures
from llm.classify.baselines import commonest, regression
from llm.classify.config import ClassifyConfig, LabelledFile
from llm.classify.predict import Classifier
from llm.classify.stage import classify
from llm.classify.texts import read_texts
from llm.data.packed import Conversation, PackedRows, lay_out, pack
from llm.export.config import ExportConfig
from llm.export.stage import export
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, load_model
from llm.training.objective import Labels

SPAM = [
    "WIN £900 now, call {} 🎉",
    "免费 赢取 {} 大奖！！",
    "ฟรี รับเงิน {} บาท",
    "اربح {} مجانا الآن",
    "मुफ़्त इनाम {} जीतें",
    "FREE\tcash {}",
]
HAM = [
    "see you at {} then",
    "我{}点回家，别等我。",
    "เจอกันตอน {} โมงนะ",
    "أراك في الساعة {}",
    "{} बजे मिलते हैं",
    "def f(x): return {}",
]


def texts(count: int = 14) -> list[tuple[str, str]]:
    return [
        (label, text.format(number))
        for number in range(count)
        for label, kinds in (("spam", SPAM), ("ham", HAM))
        for text in kinds
    ]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return written(tmp_path / "given.jsonl", [{"text": text, "label": label} for label, text in texts()])


def config(given: Path, **fields: Any) -> ClassifyConfig:
    runtime = {
        "checkpoint_every": 4,
        "validation": {"every": 10, "tokens": 65536},
        **fields.pop("runtime", {}),
    }
    return ClassifyConfig.model_validate(
        {
            "data": {"path": given}, "context": 128, "batch_rows": 2, "lr": 3e-3, "precision": "fp32",
            "held_out": 0.25, "runtime": runtime, **fields,
        }
    )  # fmt: skip


def trained(config: ClassifyConfig, inputs: dict[str, Path], out: Path) -> dict[str, float]:
    return dict(classify(config, inputs, out, LocalContext(launcher=forks.launch)))


def read(path: Path, several: bool = False, **columns: str) -> list[tuple[str, tuple[str, ...], str]]:
    [file] = pin([path], "data")
    one = LabelledFile.model_validate({"path": path, **columns})
    return [(row.text, row.labels, row.rejected) for row in read_texts(one, file, several=several)]


def test_every_form_of_a_file_is_read_and_what_is_no_text_is_rejected_with_why(tmp_path: Path) -> None:
    rows = [(text, (label,), "") for label, text in texts(1)]
    tsv = "Label\tSMS\n" + "".join(f'{label}\t"{text.replace(chr(9), " ")}\n' for label, text in texts(1))
    with gzip.open(tmp_path / "rows.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(tsv)
    assert read(tmp_path / "rows.tsv.gz") == [
        ('"' + text.replace("\t", " "), of, why) for text, of, why in rows
    ]
    (tmp_path / "rows.csv").write_text(
        '\ufefftext,n,class\r\n"a, ""b""\n日本",1,spam\r\nx,2,\r\n"",3,ham\r\nshort\r\n', encoding="utf-8"
    )
    assert read(tmp_path / "rows.csv") == [
        ('a, "b"\n日本', ("spam",), ""), ("", (), "no label"), ("", (), "no text"), ("", (), "other number of cells"),
    ]  # fmt: skip
    pq.write_table(
        pa.table({"review": ["good 👍", "bad", None], "stars": [5.0, 1.0, 2.0]}), tmp_path / "rows.parquet"
    )
    assert read(tmp_path / "rows.parquet", label="stars") == [
        ("good 👍", ("5",), ""), ("bad", ("1",), ""), ("", (), "no text")
    ]  # fmt: skip
    lines = [
        {"text": "a", "label": True}, {"text": "b", "label": 0}, {"text": 3, "label": 0}, [1],
        {"text": "c", "label": {}}, {"text": "\ud83d", "label": "x"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken", encoding="utf-8")
    assert read(tmp_path / "rows.jsonl") == [
        ("a", ("true",), ""), ("b", ("0",), ""), ("", (), "other than text"), ("", (), "no JSON object"),
        ("", (), "a label that is no text or number"), ("", (), "half of a surrogate pair"), ("", (), "no JSON object"),
    ]  # fmt: skip
    many = [
        {"text": "a", "labels": ["y", "x", "y"]},
        {"text": "b", "labels": "x, y"},
        {"text": "c", "labels": []},
    ]
    assert [row[1] for row in read(written(tmp_path / "many.jsonl", many), several=True)] == [
        ("x", "y"),
        ("x", "y"),
        (),
    ]
    (tmp_path / "none.csv").write_text("a,b,c\n1,2,3\n")
    with pytest.raises(UserError, match="no column that is known to hold the text, but 'a', 'b', 'c'"):
        read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no column 'd'"):
        read(tmp_path / "none.csv", text="a", label="d")


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("objective", [Labels(), Labels(weights=(0.5, 3.0, 1.0)), Labels(several=True)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradient_of_a_step_are_those_of_each_text_by_itself(
    positions: str, objective: Labels, ranks: int, tiny: Any
) -> None:
    shape: ModelConfig = tiny(context=24, positions=positions, init_std=0.2)
    shape = shape.model_copy(update={"labels": 3})
    chance = np.random.default_rng(1)
    given = []
    for _ in range(40):
        ids = chance.integers(1, 490, chance.integers(1, 12)).tolist()
        target = int(chance.integers(0, 8 if objective.several else 3))
        given.append(Conversation([*ids, target], [False] * len(ids) + [True]))
    rows = pack([one.length for one in given], 24)
    rows = rows[: len(rows) // 4 * 4]
    source = PackedRows([lay_out(given, rows, 24)], objective.units)
    model = Transformer(shape, seed=1).train()
    everyone = np.arange(len(rows), dtype=np.uint64)
    gradients, total = None, 0.0
    for rank in range(ranks):
        mine = everyone.reshape(ranks, -1)[rank]
        micro = [source.take(mine[at : at + 2]) for at in range(0, len(mine), 2)]
        for batch in source.weighed(micro, mine, everyone):
            outputs = model(batch.tokens_BT, documents_BT=batch.documents_BT, positions_BT=batch.positions_BT)
            scaled = objective.loss(outputs, batch) * batch.weight / (len(micro) * ranks)
            total += float(scaled.detach())
            found = torch.autograd.grad(scaled, list(model.parameters()))
            gradients = found if gradients is None else [a + b for a, b in zip(gradients, found, strict=True)]
    exact = Transformer(shape, seed=1).double()
    losses, weights = [], []
    for ids, target in ((given[n].tokens[:-1], given[n].tokens[-1]) for row in rows for n in row):
        logits = exact(torch.tensor([ids]))[0, -1].double()
        likely = torch.sigmoid(logits) if objective.several else torch.softmax(logits, dim=0)
        weights.append(objective.weights[target] if objective.weights else 1.0)
        if objective.several:
            bits = [target >> bit & 1 for bit in range(3)]
            each = [-torch.log(p if bit else 1 - p) for p, bit in zip(likely, bits, strict=True)]
            losses.append(sum(each) / 3)
        else:
            losses.append(-torch.log(likely[target]) * weights[-1])
    wanted = torch.stack(losses).sum() / sum(weights)
    assert total == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert gradients is not None
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, list(exact.parameters())), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6)


def test_a_model_learns_labels_and_says_what_became_of_each_row(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    with given.open("a", encoding="utf-8") as file:
        rows = [
            {"text": texts()[0][1], "label": "spam"},
            {"text": "?"},
            {"text": "long " * 200, "label": "ham"},
        ]
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    metrics = trained(config(given, epochs=12.0), inputs, out)
    assert metrics["accuracy"] > 0.8
    assert metrics["accuracy_low"] < metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["accuracy_commonest"] < 0.7
    assert metrics["val_loss"] < metrics["val_loss_before"]
    assert (
        metrics["rejected/no label"]
        == metrics["dropped/the same again"]
        == metrics["cut/longer than a row"]
        == 1
    )
    assert metrics["texts"] + metrics["held_out_texts"] == len(texts()) + 1
    rows = pq.read_table(out / "predictions.parquet").to_pylist()
    assert len(rows) == metrics["held_out_texts"]
    assert np.mean([row["right"] for row in rows]) == pytest.approx(metrics["accuracy"])
    truth, said = ([row[name][0] for row in rows] for name in ("labels", "given"))
    assert metrics["f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert metrics["f1/spam"] == pytest.approx(f1_score(truth, said, pos_label="spam"))
    assert 0 <= metrics["calibration_error_low"] <= metrics["calibration_error_high"] <= 1
    assert sum(len(row["labels"]) for row in rows) == len(rows)
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "logistic regression" in report
    assert "McNemar" in report
    described = json.loads((out / "labels.json").read_text(encoding="utf-8"))
    assert described == {"labels": ["ham", "spam"], "several": False, "texts": described["texts"]}

    model = load_model(out, labels=True)
    with torch.inference_mode():
        for row in rows[:4]:
            ids = Classifier.of(out, inputs["tokenizer"]).tokens(row["text"], 128)
            alone = model(torch.tensor([ids]))[0, -1].double().softmax(dim=0)
            assert row["probabilities"] == pytest.approx(alone.tolist(), abs=1e-5)
    for opened in (lambda: load_model(out), lambda: Speaker.of("x", out, inputs["tokenizer"])):
        with pytest.raises(UserError, match="gives texts labels: it continues none"):
            opened()


@pytest.mark.parametrize("positions", ["rotary", "learned", "qwen3"])
def test_transformers_computes_the_same_from_the_export(
    positions: str, given: Path, inputs: dict[str, Path], tiny: Any, saved_model: Any, tmp_path: Path
) -> None:
    shape = {"qk_norm": True} if positions == "qwen3" else {"positions": positions, "tie_embeddings": True}
    inputs = {**inputs, "model": saved_model(tiny(context=256, **shape), seed=3)}
    trained(config(given, epochs=1.0), inputs, tmp_path / "model")
    (tmp_path / "export").mkdir()
    made = {**inputs, "model": tmp_path / "model"}
    manifest = {
        "stage": "classify",
        "fingerprint": "0" * 16,
        "config": {"data": [{"name": "given", "path": "1" * 64}]},
        "metrics": {"f1": 0.5, "f1_low": 0.4, "f1_high": 0.6},
    }
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    metrics = export(ExportConfig(name="x"), made, tmp_path / "export", LocalContext())
    assert metrics["logits_max_abs_difference"] < 1e-4
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    ours = Classifier.of(tmp_path / "export", tmp_path / "export")
    asked = [text for _, text in texts(1)]
    with torch.inference_mode():
        logits = theirs(
            **tokenizer(asked, return_tensors="pt", padding=True)
        ).logits  # of unlike lengths, at once
    assert ours.logits([ours.tokens(text) for text in asked]) == pytest.approx(
        logits.double().numpy(), abs=1e-4
    )
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "text-classification" in card
    assert "0.4 to 0.6" in card


@pytest.mark.parametrize("part", [{"last_blocks": 1}, {"lora": {"rank": 2}}])
def test_only_a_part_is_trained(
    part: dict[str, Any], given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    runtime = {"ranks": 2, "zero_stage": 3} if "lora" in part else {}
    trained(config(given, epochs=2.0, lr=1e-2, runtime=runtime, **part), inputs, tmp_path / "out")
    before, after = load_model(inputs["model"]), load_model(tmp_path / "out", labels=True)
    start = dict(before.named_parameters())
    moved = {
        name.removesuffix(".weight")
        for name, parameter in after.named_parameters()
        if name != "lm_head.weight" and not torch.equal(parameter, start[name])
    }
    if "last_blocks" in part:
        assert {"norm", "layers.1.mlp.up_proj"} <= moved
        assert not any(name.startswith(("layers.0", "embed")) for name in moved)
        return
    assert moved == {name for name in moved if name.endswith("_proj")} != set()
    (tmp_path / "base").mkdir()
    named = {"model": tmp_path / "out", "tokenizer": inputs["tokenizer"]}
    export(ExportConfig(name="x"), named, tmp_path / "base", LocalContext())
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    without = {
        f"model.{name}": (weight[:500] if "embed" in name else weight)
        for name, weight in start.items()
        if "lm_head" not in name
    }
    theirs.load_state_dict(without, strict=False)
    theirs.score.weight.data.zero_()  # what the adapter holds takes its place
    adapted = PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter").eval()
    ids = torch.randint(1, 490, (2, 30))
    with torch.inference_mode():
        torch.testing.assert_close(adapted(ids).logits, after(ids)[:, -1], rtol=1e-4, atol=1e-4)


def test_several_labels_a_text(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"text": f"{number} " + " ".join(one), "labels": list(one)}
        for number in range(30)
        for one in ((), ("urgent",), ("money",), ("urgent", "money"))
    ]
    metrics = trained(
        config(written(tmp_path / "rows.jsonl", rows), several=True, epochs=20.0), inputs, tmp_path / "out"
    )
    assert metrics["accuracy"] > metrics["accuracy_commonest"]
    found = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert {tuple(row["labels"]) for row in found} == {(), ("urgent",), ("money",), ("money", "urgent")}


def test_labels_count_alike_where_that_is_asked_for(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    with given.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": f"more ham {n}", "label": "ham"}) + "\n" for n in range(200)))
    metrics = trained(config(given, balance="equal", epochs=0.5), inputs, tmp_path / "equal")
    assert metrics["texts"] + metrics["held_out_texts"] == 2 * 14 * len(SPAM)
    assert metrics["dropped/more than the rarest label has"] == 200
    held_out = [
        row["labels"][0] for row in pq.read_table(tmp_path / "equal" / "predictions.parquet").to_pylist()
    ]
    assert 0.3 < held_out.count("ham") / len(held_out) < 0.7
    weighed = trained(config(given, balance="weights", epochs=0.5), inputs, tmp_path / "weights")
    alike = trained(config(given, epochs=0.5), inputs, tmp_path / "alike")
    assert weighed["texts"] == alike["texts"]
    assert weighed["loss"] != alike["loss"]


def test_a_file_may_be_read_twice_by_other_columns(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"a": f"hello {n}", "b": f"bonjour {n}", "x": "ham", "y": "spam"} for n in range(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    data = [
        {"path": path, "name": "first", "text": "a", "label": "x"},
        {"path": path, "name": "second", "text": "b", "label": "y"},
    ]
    metrics = trained(config(path, data=data, epochs=0.2), inputs, tmp_path / "out")
    assert metrics["texts"] + metrics["held_out_texts"] == 80
    assert "dropped/the same again" not in metrics


@pytest.mark.long
def test_ranks_and_zero_stages_train_alike(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    losses: dict[str, Any] = {}
    for name, runtime in {
        "one": {"micro_batch": 1}, "zero 1": {"ranks": 2, "zero_stage": 1}, "zero 3": {"ranks": 2, "zero_stage": 3}
    }.items():  # fmt: skip
        trained(config(given, epochs=1.0, balance="weights", runtime=runtime), inputs, tmp_path / name)
        losses[name] = pq.read_table(tmp_path / name / "losses.parquet")["loss"].to_numpy()
    for name in ("zero 1", "zero 3"):
        np.testing.assert_allclose(losses[name], losses["one"], rtol=1e-3)


def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    given: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    wanted = config(given, epochs=12.0)
    trained(wanted, inputs, tmp_path / "whole")
    stage = Stage(wanted, inputs, tmp_path / "killed", stage="classify")
    stage.wait_for("checkpoint", 4)
    stage.kill()
    trained(wanted, inputs, tmp_path / "killed")
    assert payload(tmp_path / "killed") == payload(tmp_path / "whole")


def test_mistakes_are_said(given: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 1 labels \(x\), where 2 to 1,000 are wanted"):
        trained(
            config(written(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}])), inputs, tmp_path / "one"
        )
    with pytest.raises(UserError, match="has the label no such"):
        trained(config(given, labels=("spam", "no such")), inputs, tmp_path / "other")
    with given.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "x", "label": "eggs"}) + "\n")
    metrics = trained(config(given, labels=("spam", "ham"), epochs=0.2), inputs, tmp_path / "some")
    assert metrics["rejected/a label that is not among labels"] == 1
    with pytest.raises(ValueError, match="two ways to train a part"):
        config(given, last_blocks=1, lora={"rank": 2})
    with pytest.raises(ValueError, match="goes with one label a text"):
        config(given, several=True, balance="equal")


def test_measures_hold_on_made_up_answers() -> None:
    chance = np.random.default_rng(0)
    truth = np.eye(3, dtype=bool)[chance.integers(0, 3, 400)]
    given = np.where(chance.random((400, 1)) < 0.8, truth, np.roll(truth, 1, axis=1))
    found = measures.accuracy(given, truth)
    assert found.low < 0.8 < found.high
    each, mean = measures.f1(given, truth)
    assert [one.value for one in each] == pytest.approx(
        f1_score(truth.argmax(1), given.argmax(1), average=None).tolist()
    )
    assert mean.low < mean.value < mean.high
    confidence = chance.uniform(0.5, 1.0, 20_000)
    right = chance.random(20_000) < confidence
    assert measures.calibration(confidence, right).value < 0.02
    assert measures.calibration(confidence, right & (chance.random(20_000) < 0.8)).value > 0.1


def test_baselines_learn_what_there_is_to_learn() -> None:
    labels = np.array([[label == "ham", label == "spam"] for label, _ in texts()])
    asked = [text for _, text in texts()]
    held_out, truth = asked[::3], labels[::3]
    assert (regression(asked, labels, held_out, balanced=False) == truth).all(axis=1).mean() > 0.95
    assert commonest(np.array([[True, False]] * 3 + [[False, True]]), 2).tolist() == [[True, False]] * 2
    several = np.column_stack([labels[:, 0], labels[:, 1], np.ones(len(labels), bool)])
    assert (regression(asked, several, held_out, balanced=False)[:, 2]).all()
