"""Shared by the tests of the whole line: a small real corpus, a recipe for it, and the command line."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
from command_line import Llmill

from flows.servers import PrefectServer

RECIPE = """\
name: small
download:
  shard_bytes: 150_000
  sources:
    - {{name: stdlib, kind: local, path: {corpus}}}
clean:
  gopher: null
train_tokenizer: {{vocab_size: 512}}
tokenize: {{val_fraction: 0.1}}
pretrain:
  model: {{layers: 2, width: 32, heads: 2, context: 64, tie_embeddings: true}}
  tokens: 61_440
  batch_tokens: 1024
  lr: 3.0e-3
  validation: {{every: 20, tokens: 4096}}
  runtime: {{checkpoint_every: 5}}
evaluate: {{max_new_tokens: 16}}
"""


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """One Prefect server for all runs of the session, as a team would have one."""
    before = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        server.wait()
        yield os.environ["PREFECT_API_URL"]
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About 600 kB of this Python's own sources, with an exact and a near duplicate planted."""
    folder = tmp_path_factory.mktemp("corpus")
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if 2_000 < path.stat().st_size < 120_000 and total < 600_000:
            total += path.stat().st_size
            (folder / f"{path.stem}.txt").write_bytes(path.read_bytes())
    text = (folder / "argparse.txt").read_text()
    (folder / "zz_copy.txt").write_text(text)
    (folder / "zz_almost.txt").write_text(text + "\n# one more line\n")
    return folder


@pytest.fixture(scope="session")
def make_llmill(tmp_path_factory, prefect_server, corpus):
    """``make_llmill()``: the command line on a new home, with the small recipe."""

    def make(home: Path | None = None, recipe: str = RECIPE) -> Llmill:
        home = home or tmp_path_factory.mktemp("home")
        path = tmp_path_factory.mktemp("recipe") / "small.yaml"
        path.write_text(recipe.format(corpus=corpus))
        return Llmill(home, path)

    return make


@pytest.fixture(scope="session")
def finished(make_llmill) -> Llmill:
    """A home in which the small recipe has run undisturbed. Tests must not change what is sealed there."""
    llmill = make_llmill()
    llmill.afresh("run", str(llmill.recipe))
    return llmill
