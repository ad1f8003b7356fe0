"""``llmill settings``: what a recipe may say, as the configs have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.core.errors import UserError
from flows.settings import reference, settings
from flows.stages import STAGES
from llm.model.config import ModelShape

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_reference_in_the_docs_is_that_of_the_configs() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference(), "python -m flows.settings > docs/settings.md"


def test_every_setting_has_a_type_and_says_what_it_does() -> None:
    known = settings()
    assert {stage.name for stage in STAGES} <= {one.name.partition(".")[0] for one in known}
    assert [one.name for one in known if not (one.type and one.description)] == []


def test_what_is_said_of_a_setting_is_what_its_config_takes() -> None:
    [one] = settings("pretrain.schedule.warmup_share")
    assert (one.type, one.default, one.range) == ("number", "0.02", "from 0, below 1")
    assert one.description == "Fraction of the steps in which the rate rises."
    [one] = settings("pretrain.tokens")
    assert (one.type, one.default, one.range) == ("integer", "", "from 1")
    [one] = settings("pretrain.optimizer.kind")
    assert (one.type, one.default) == ("adamw, muon", "muon")
    [one] = settings("clean.masking.email")
    assert (one.type, one.default) == ("text or null", "<EMAIL>")
    assert [one.name for one in settings("download.sources.N.dataset")] == ["download.sources.N.dataset"]


def test_a_setting_that_only_some_kinds_of_source_have_says_which() -> None:
    [one] = settings("download.sources.N.dataset")
    assert one.description.startswith("Of huggingface. ")
    [one] = settings("download.sources.N.text_field")
    assert not one.description.startswith("Of ")
    [one] = settings("download.sources.N.encoding")
    assert one.description.startswith("Of local, http, objects. ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pretrian", "did you mean pretrain"),
        ("pretrain.lrr", "pretrain.lr"),
        ("pretrain.schedul", "did you mean pretrain.schedule,"),
        ("目", "there are name"),
    ],
)
def test_a_name_that_no_setting_has_is_answered_with_those_alike(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no setting is called {name}; .*{hint}"):
        settings(name)


def test_a_config_that_says_all_defaults_is_one_that_says_none() -> None:
    said = {one.name.rpartition(".")[2]: yaml.safe_load(one.default) for one in settings("pretrain.model")}
    assert ModelShape.model_validate(said) == ModelShape()
    assert said.keys() == ModelShape.model_fields.keys()
