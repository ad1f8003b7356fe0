"""The bytes that the stages write, for texts that never change: what moves code may not move these.

The sums are those of the code as it stood before steps and the run log. A stage that is meant to write something else
gets another version, and another sum here.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Llmill

from flows.engine.store import Store
from flows.stages import DEFAULT

SENTENCES = (
    "The river bends north of the old mill, and nobody has crossed it since the bridge fell.",
    "Der Müller zählte die Säcke, schrieb die Zahl auf und ging über die Brücke nach Hause.",
    "老磨坊在河的北边，桥塌了以后没有人过去。",
    "โรงสีเก่าอยู่ทางเหนือของแม่น้ำ และไม่มีใครข้ามไปตั้งแต่สะพานพัง",
    "الطاحونة القديمة شمال النهر، ولم يعبر أحد منذ سقوط الجسر.",
    "पुरानी चक्की नदी के उत्तर में है, और पुल गिरने के बाद कोई पार नहीं गया।",
    "def mill(sacks):\\n\\treturn sum(sack.weight for sack in sacks if sack.weight > 0)",
    "Grandmother's bread 🍞 was never 👵🏽 written down 🤷‍♀️, she said at last.",
)
RECIPE = """\
name: small
download: {{shard_bytes: 60_000, sources: [{{name: mill, kind: local, path: {corpus}}}]}}
clean: {{gopher: null}}
train_tokenizer: {{vocab_size: 512}}
tokenize: {{val_fraction: 0.1}}
pretrain:
  model: {{layers: 1, width: 32, heads: 2, context: 64, tie_embeddings: true}}
  tokens: 10_240
  batch_tokens: 1024
  precision: fp32
evaluate: {{max_new_tokens: 4}}
"""
SUMS = {
    "clean/documents-00000.parquet": "565f97a9ba6a406c",
    "clean/documents-00001.parquet": "763313a07634a304",
    "clean/documents-00002.parquet": "cd10fad1f8f054f3",
    "clean/documents-00003.parquet": "dae6177f1c8ef79d",
    "clean/documents-00004.parquet": "bfea56ef343f752b",
    "clean/documents-00005.parquet": "65c86a517d3045d1",
    "clean/documents-00006.parquet": "488800cb15aeafab",
    "clean/documents-00007.parquet": "87d42dbe5d0f74ca",
    "clean/report.json": "56c45adca1185199",
    "clean/report.md": "5955188f5326e46f",
    "dedup/documents-00000.parquet": "d2502e4eb8233355",
    "dedup/documents-00001.parquet": "abbfaca84a397a15",
    "dedup/documents-00002.parquet": "e9887700ed6369ac",
    "dedup/documents-00003.parquet": "bf8dae8019034439",
    "dedup/documents-00004.parquet": "bfea56ef343f752b",
    "dedup/documents-00005.parquet": "262af6fe2c891695",
    "dedup/documents-00006.parquet": "2c748f3b3afd1476",
    "dedup/documents-00007.parquet": "87d42dbe5d0f74ca",
    "dedup/removed.parquet": "0ab92ae193f2b1f9",
    "dedup/report.md": "81e7a141cb89c676",
    "download/documents-00000.parquet": "565f97a9ba6a406c",
    "download/documents-00001.parquet": "763313a07634a304",
    "download/documents-00002.parquet": "cd10fad1f8f054f3",
    "download/documents-00003.parquet": "dae6177f1c8ef79d",
    "download/documents-00004.parquet": "bfea56ef343f752b",
    "download/documents-00005.parquet": "65c86a517d3045d1",
    "download/documents-00006.parquet": "488800cb15aeafab",
    "download/documents-00007.parquet": "87d42dbe5d0f74ca",
    "download/report.md": "2cd7d02f98685e4d",
    "download/sources.json": "b87c9d45310b7917",
    "tokenize/report.md": "726e9d1260cd4122",
    "tokenize/train-00000.parquet": "8931c7d5f9f6d721",
    "tokenize/val-00000.parquet": "c6b8e7c13a5d249f",
    "train_tokenizer/report.md": "b9a6401e01aa9c8b",
    "train_tokenizer/special_tokens_map.json": "79c4e18958fe6f17",
    "train_tokenizer/tokenizer.json": "8b74b962b660c757",
    "train_tokenizer/tokenizer_config.json": "02ec9deebfa6cf1f",
}
"""Stage/file -> the first 16 digits of its sha256, of stages that compute nothing in floating point."""
LOSS = 6.155945301055908
"""Of the last step, in nats: processors differ in the last bits of sums."""


def write_texts(folder: Path) -> None:
    """Documents of a few sentences each, some of them twice, from a generator whose numbers never change."""
    chance = random.Random(20261129)
    folder.mkdir()
    for number in range(240):
        count = chance.randrange(4, 30)
        words = " ".join(chance.choice(SENTENCES) + f" {chance.randrange(1000)}" for _ in range(count))
        (folder / f"{number:03}.txt").write_text(words, encoding="utf-8")
        if number % 40 == 0:
            (folder / f"{number:03}-again.txt").write_text(words, encoding="utf-8")


@pytest.fixture(scope="module")
def made(make_llmill: Any, tmp_path_factory: pytest.TempPathFactory) -> Llmill:
    folder = tmp_path_factory.mktemp("texts") / "mill"
    write_texts(folder)
    llmill: Llmill = make_llmill(recipe=RECIPE.replace("{corpus}", str(folder)))
    llmill("run", str(llmill.recipe))
    return llmill


def test_the_data_stages_write_the_bytes_that_they_always_wrote(made: Llmill) -> None:
    found = {
        f"{artifact.stage}/{entry['path']}": entry["sha256"][:16]
        for artifact in Store(made.home).artifacts()
        for entry in artifact.manifest["files"]
        if artifact.stage not in ("pretrain", "evaluate", "export") and not entry["path"].startswith("logs/")
    }
    assert {name: found.get(name) for name in SUMS} == SUMS


def test_training_comes_to_the_loss_that_it_always_came_to(made: Llmill) -> None:
    [model] = Store(made.home).artifacts("pretrain")
    assert model.metrics["loss"] == pytest.approx(LOSS, abs=1e-4)
    assert json.loads((model.path / "model.json").read_text())["layers"] == 1


def test_the_card_of_an_export_names_each_step_once_in_their_order(made: Llmill) -> None:
    [export] = Store(made.home).artifacts("export")
    card = (export.path / "README.md").read_text()
    rows = [
        line.split("|")[1].strip() for line in card.splitlines() if re.search(r"\| `[0-9a-f]{12}` \|", line)
    ]
    assert rows == list(DEFAULT[:-1])
