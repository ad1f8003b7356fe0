"""``llmill init``: a first recipe for a text of one's own."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.core.errors import UserError
from flows.cli.main import make_app
from flows.new_recipe import new_recipe
from flows.recipe import load_recipe


def loaded(folder: Path, text: str):
    (folder / "a.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "a.yaml")


@pytest.mark.parametrize("name", ["mine", "Mein.Buch-1", "x"])
@pytest.mark.parametrize("place", ["texte", "an 'odd\" name: [x] #", "本"])
def test_what_is_written_is_a_recipe_of_the_folder_whatever_that_is_called(
    tmp_path: Path, name: str, place: str
) -> None:
    folder = tmp_path / place
    folder.mkdir()
    (folder / "one.txt").write_text("text " * 100)
    (folder / "two.pdf").write_bytes(b"%PDF")
    recipe = loaded(tmp_path, new_recipe(name, str(folder)))
    assert recipe.name == name
    assert recipe.download.sources[0].path == str(folder)
    assert recipe.pretrain.depth == 2


def test_books_are_cut_and_pages_are_not(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("word " * 100_000)
    assert loaded(tmp_path, new_recipe("a", str(tmp_path / "*.txt"))).download.sources[0].split_chars == 4000
    for number in range(20):
        (tmp_path / f"page{number}.txt").write_text("word " * 100)
    assert loaded(tmp_path, new_recipe("a", str(tmp_path / "page*"))).download.sources[0].split_chars is None


def test_what_is_read_and_what_is_not_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000))
    (tmp_path / "b.txt").write_text("x" * 1000)
    (tmp_path / "c.exe").write_bytes(b"MZ")
    assert "1 others are not read" in new_recipe("a", str(tmp_path)).splitlines()[0]


def test_a_data_set_of_the_hub_is_named() -> None:
    text = new_recipe("edu", "HuggingFaceFW/fineweb-edu")
    assert '"dataset": "HuggingFaceFW/fineweb-edu"' in text


@pytest.mark.parametrize("place", ["nowhere", "no/such/folder", "empty"])
def test_where_nothing_is_to_be_read_none_is_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to read"):
        new_recipe("a", str(tmp_path / place))


def test_the_command_writes_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    done = CliRunner().invoke(make_app(), ["init", "mine"])
    assert done.exit_code == 0, done
    assert "llmill run mine.yaml" in done.output
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"
    with pytest.raises(UserError, match="is there already"):
        CliRunner().invoke(make_app(), ["init", "mine"], catch_exceptions=False)
    with pytest.raises(UserError, match="name"):
        CliRunner().invoke(make_app(), ["init", "a b"], catch_exceptions=False)
    assert not (tmp_path / "a b.yaml").exists()
