"""Recipes: precedence, and mistakes that are told with their place."""

from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from flows.recipe import flatten, load_recipe, shipped_recipes

RECIPE = """\
name: small
download:
  sources:
    - {name: books, kind: local, path: books}
    - name: python
      kind: installed-python
clean:
  min_chars: 10
pretrain: {tokens: 1000}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "small.yaml")


def test_overrides_beat_the_file_and_the_file_beats_defaults(recipe):
    loaded = load_recipe(recipe)
    assert (loaded.clean.min_chars, loaded.dedup.ngram) == (10, 5)
    changes = [
        "clean.min_chars=20",
        "dedup.ngram=7",
        "pretrain.lr=3e-3",
        "download.sources.0.path=else/where",
    ]
    changed = load_recipe(recipe, changes)
    assert (changed.clean.min_chars, changed.dedup.ngram, changed.pretrain.lr) == (20, 7, 3e-3)
    assert changed.download.sources[0].path == "else/where"


def test_an_override_may_switch_a_rule_off(recipe):
    assert load_recipe(recipe, ["clean.gopher.min_stop_words=null"]).clean.gopher.min_stop_words is None


NUMBERS = [
    ("pretrain.tokens", "2e5", 200_000),
    ("pretrain.tokens", "1.5e+3", 1500),
    ("pretrain.tokens", "61_440", 61_440),
    ("pretrain.tokens", '"2e5"', 200_000),
    ("pretrain.tokens", "0100", 100),
    ("pretrain.lr", "1e-3", 1e-3),
    ("pretrain.betas", "[9e-1, 0.95]", (0.9, 0.95)),
    ("pretrain.runtime.micro_batch", "1e0", 1),
    ("clean.min_chars", "1e1", 10),
    ("clean.gopher.min_words", "5e1", 50),
    ("runtime.workers", "4e0", 4),
]


@pytest.mark.parametrize(("key", "text", "value"), NUMBERS)
def test_a_number_is_read_alike_from_the_file_and_from_an_override(recipe, key, text, value):
    loaded = load_recipe(recipe, [f"{key}={text}"])
    inner = text
    for part in reversed(key.split(".")[1:]):
        inner = f"{{{part}: {inner}}}"
    stage = key.partition(".")[0]
    kept = [line for line in RECIPE.splitlines() if not line.startswith(("pretrain", "clean", "  min_chars"))]
    others = {"pretrain": "pretrain: {tokens: 1000}", "clean": "clean: {min_chars: 10}"}
    if key.startswith("pretrain.") and key != "pretrain.tokens":
        inner = inner.replace("{", "{tokens: 1000, ", 1)
    if key.startswith("clean.") and key != "clean.min_chars":
        inner = inner.replace("{", "{min_chars: 10, ", 1)
    others[stage] = f"{stage}: {inner}"
    recipe.write_text("\n".join([*kept, *others.values()]) + "\n")
    assert load_recipe(recipe) == loaded
    found = loaded
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("text", ["true", "1:30", "1.5", "yes"])
@pytest.mark.parametrize("key", ["pretrain.tokens", "clean.min_chars", "runtime.workers", "dedup.ngram"])
def test_what_is_no_whole_number_is_refused_for_one(recipe, key, text):
    assert f"{key}: Input should be" in mistake(recipe, f"{key}={text}")


def test_text_that_looks_like_a_number_stays_text(recipe):
    loaded = load_recipe(recipe, ["download.sources.0.path=1e5", "evaluate.prompts=['2e5', '0100']"])
    assert loaded.download.sources[0].path == "1e5"
    assert loaded.evaluate.prompts == ("2e5", "0100")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            "pretrain.validation.every=5",
            ["--set pretrain.validation.every=5: ", "it is pretrain.runtime.validation now"],
        ),
        ("pretrain.recovery.max_nonfinite=5", ["no such key; it is pretrain.runtime.max_nonfinite now"]),
        ("clean.min_charz=3", ["--set clean.min_charz=3", "no such key; did you mean min_chars?"]),
        ("clean.language.allowd=[en]", ["clean.language.allowd", "no such key; did you mean allowed?"]),
        ("clean.min_chars=many", ["--set clean.min_chars=many", "valid integer", "'many'"]),
        ("clean.min_chars=-1", ["greater than or equal to 1", "-1"]),
        ("dedup.bands=0", ["greater than or equal to 1"]),
        ("runtime.workers=many", ["--set runtime.workers=many: runtime.workers", "'auto'", "valid integer"]),
        ("pretrain.weight_decay=.inf", ["finite number"]),
        ("clean.min_chars", ["write it as step.field=value"]),
        ("cleam.min_chars=3", ["did you mean clean?"]),
        ("download.sources.7.path=x", ["7 is not a position in a list of 2"]),
        ("name.first=x", ["name holds a value, not settings"]),
        ("pretrain.model.heads=5", ["width 768 does not divide into 5 heads"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line(recipe, wrong, told):
    message = mistake(recipe, wrong)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (RECIPE.replace("min_chars", "min_charz"), "small.yaml:8: clean.min_charz: no such key"),
        (RECIPE.replace("min_chars: 10", "min_chars: ten"), "small.yaml:8: clean.min_chars"),
        (RECIPE.replace("path: books}", "path: books, pth: x}"), "small.yaml:4: download.sources.0.pth"),
        (RECIPE.replace("kind: installed-python", "kind: gopher"), "small.yaml:5: download.sources.1"),
        (RECIPE.replace("tokens: 1000", "toks: 1000"), "small.yaml:9: pretrain.toks"),
        ("name: [", "not valid YAML"),
        (RECIPE + "clean: {}\n", "small.yaml:10: clean is there twice"),
        (RECIPE.replace("small", "2026-13-45"), "not valid YAML"),
        ("- a\n- b", "a recipe is a mapping"),
    ],
)
def test_a_wrong_recipe_is_told_with_file_line_and_key(recipe, text, told):
    recipe.write_text(text)
    assert told in mistake(recipe)


def test_a_password_in_a_mistake_is_not_repeated(recipe):
    recipe.write_text(
        RECIPE.replace(
            "kind: installed-python", "kind: http\n      urls: ['https://me:hunter2@example.org/a.txt']"
        )
    )
    assert "hunter2" not in mistake(recipe)
    assert "example.org" in mistake(recipe)


def test_a_missing_recipe_names_those_there_are(tmp_path):
    assert "flows/recipes/quickstart.yaml" in mistake(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", shipped_recipes())
def test_the_shipped_recipes_are_valid(path):
    root = Path(__file__).parents[2]
    assert load_recipe(root / path).name == Path(path).stem


def test_flatten_numbers_what_is_in_lists():
    value = {"a": {"b": 1}, "sources": [{"name": "x"}, {"name": "y"}], "betas": [0.9, 0.95], "none": {}}
    assert flatten(value) == {
        "a.b": 1, "sources.0.name": "x", "sources.1.name": "y", "betas": [0.9, 0.95], "none": {}
    }  # fmt: skip
