"""Shared by the tests of the whole line: a small real corpus, a recipe for it, and the command line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Llmill, kill_tree
from xdist.scheduler import LoadScopeScheduling

from flows.prefect.servers import PrefectServer

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two tests run at once: threads of one would wait for the other's

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        # Begun by nohup or in a shell's background, we go on to ignore it, but what we start is not told to.
        signal.signal(_number, lambda *_: None)

SLOWEST = (
    "test_operations", "test_durable", "test_end_to_end", "swept", "test_outages", "test_training",
    "test_engines", "test_prefect_outage", "test_mistakes", "test_gc", "test_credentials", "test_mlflow",
    "test_slurm", "test_trace", "test_listeners", "test_two_models", "test_parallel_steps", "test_benchmarks",
    "test_bench", "test_branches", "test_proxy", "test_score", "test_finetune", "test_finetuned",
)  # fmt: skip
"""Which files are begun first, so that no worker is left with a long one; those that wait beside those that compute."""
LONGER = (
    "test_align", "test_chat", "test_classify", "test_clean", "test_dedup", "test_delivery", "test_deploy",
    "test_discards", "test_harness", "test_ladder", "test_scaling", "test_begin",
    "test_homes", "test_hub", "test_installation", "test_interrupts", "test_kubernetes", "test_minhash", "test_nodes",
    "test_objects", "test_optim", "test_preference", "test_readers", "test_remote", "test_schedule", "test_servers",
    "test_start", "test_state", "test_steps", "test_stopping", "test_takedown", "test_token_shards", "test_tokenizer",
    "test_votes",
)  # fmt: skip
"""Others that take more than seven seconds each."""
SHARED = {
    "test_compare": "swept", "test_promote": "swept", "test_sweep": "swept", "test_side_by_side": "swept",
}  # fmt: skip
"""Files that go to the same worker, for what they share takes long to make."""


MAY_BE_SKIPPED = {
    r"flash\d?: ": 24,
    "of a chunk of 1 MB": 2,
    "only root can be others": 2,
    "lets us mount no small disk": 2,
    "oneDNN": 40,
    "nginx is not installed": 3,
    "util-linux is not installed": 1,
    "kubectl is not installed": 1,
    "PostgreSQL's": 40,
    "no Chromium is installed": 10,
    "Slurm's daemons are not installed": 1,
    "can't be had": 4,
    "lm-evaluation-harness is not installed": 4,
    "llama-cpp-python is not installed": 13,
}
"""What a machine may lack (a pattern of the reason), and how many tests may be skipped for it: none is in silence."""


class Skips:
    """Counts what was skipped for what, and fails the session where it is more than may be."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def too_many(self) -> list[str]:
        """Describe those that nothing allows."""
        allowed: Counter[str] = Counter()
        for reason, count in self.reasons.items():
            pattern = next((one for one in MAY_BE_SKIPPED if re.search(one, reason)), reason)
            allowed[pattern] += count
        return [
            f"{count} skipped, {MAY_BE_SKIPPED.get(pattern, 0)} may be: {pattern}"
            for pattern, count in allowed.items()
            if count > MAY_BE_SKIPPED.get(pattern, 0)
        ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.too_many() and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for reason, count in self.reasons.items():
            terminalreporter.write_line(f"{count} skipped: {reason}")
        for line in self.too_many():
            terminalreporter.write_line(line, red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only what takes seconds, and one run at toy size")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips())


def group_of(file: str) -> str:
    return SHARED.get(Path(file).stem, Path(file).stem)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        items[:] = [item for item in items if is_quick(item)]
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(group_of(str(item.path)), len(place)))


def is_quick(item: pytest.Item) -> bool:
    """Whether a test belongs to `make test-quick`: of those that need a whole run, the ones of one file."""
    file = item.path.stem
    whole = "prefect_server" in getattr(item, "fixturenames", ()) and file != "test_prefect"
    return not whole and file not in SLOWEST + LONGER and file not in SHARED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """A file goes to one worker."""

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return ByFile(config, log)


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
  runtime: {{checkpoint_every: 5, validation: {{every: 20, tokens: 4096}}}}
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
    """A home in which the small recipe has run undisturbed: see `shared_home_is_kept`."""
    llmill = make_llmill()
    llmill.afresh("run", str(llmill.recipe))
    return llmill


@pytest.fixture(autouse=True)
def shared_home_is_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """See that a test seals nothing in the home `finished`: one that comes after it may read what is there.

    Which comes after which changes with the machine. What is to be changed is a copy (`copy_finished`).
    """
    shared = request.getfixturevalue("finished") if "finished" in request.fixturenames else None
    before = shared.sealed() if shared else set()
    yield
    assert (shared.sealed() if shared else set()) == before, "the shared home was changed: use copy_finished"


@pytest.fixture(scope="session")
def copy_finished(finished: Llmill) -> Callable[[Path], Llmill]:
    """``copy_finished(home)``: a home that may be changed, with what the small recipe made and nothing else sealed.

    Tests that share `finished` leave what they failed at and what they made with other settings.
    """
    made = {step["fingerprint"] for step in finished.plan().values()}

    def others(folder: str, names: list[str]) -> list[str]:
        if Path(folder).parent == finished.home / "store":
            return [name for name in names if name not in made]
        state = ".json" if folder == str(finished.home / "runs") else ".lock"
        return [name for name in names if name.endswith(state)]

    def copy(home: Path) -> Llmill:
        shutil.copytree(finished.home, home, ignore=others)
        return replace(finished, home=home)

    return copy


SWEPT = (
    RECIPE.replace("path: {corpus}", "path: {corpus}, split_chars: 4000")
    .replace("gopher: null", "{{gopher: null, decontamination: {{sets: {{quiz: {{path: {corpus}.txt}}}}}}}}")
    .replace("clean:\n  ", "clean: ")
    .replace("val_fraction: 0.1", "val_fraction: 0.2")
    .replace("tokens: 61_440", "tokens: 24_576")
)
"""The small recipe, with more held-out documents, and without those that hold a part of a quiz."""
SWEEP = ("--grid", "pretrain.lr=0.003,0.00001", "--seeds", "2")


@pytest.fixture(scope="session")
def swept(make_llmill, corpus) -> Llmill:
    """A home with a sweep over a good and a bad rate, two seeds each, which was killed within its second training.

    Tests must not change what is sealed there.
    """
    words = (corpus / "argparse.txt").read_text().split()
    corpus.with_suffix(".txt").write_text(" ".join(words[1000:1040]))
    llmill = make_llmill(recipe=SWEPT)
    run = llmill.start("sweep", str(llmill.recipe), *SWEEP)
    events = "store/pretrain/*.partial/logs/events.jsonl"
    while not list(llmill.home.glob("store/export/*/manifest.json")) or not any(
        path.read_text().count('"step"') > 8 for path in llmill.home.glob(events)
    ):
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    kill_tree(run)
    (llmill.home / "sweep.txt").write_text(llmill("sweep", str(llmill.recipe), *SWEEP).stdout)
    return llmill
