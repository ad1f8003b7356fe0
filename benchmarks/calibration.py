"""How often `llmill compare` says "better" on a fixed set where no corpus is, and how often where one is.

    python -m benchmarks.calibration TEXTS

In each trial two random halves of the documents, and the second half with a fifth of its words shuffled, are three
corpora; small models are trained on each, from several seeds, and scored on documents that none of them holds. The
tests are those of `compare`: of two models, over documents; of two corpora, over seeds and documents.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from benchmarks.report import Report
from data_pipeline.core.processes import process_pool
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, token_bytes
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.score.documents import score_documents
from llm.score.replicas import Replicas
from llm.score.statistics import LEVEL, Floats, paired_bootstrap, seeds_test

SHUFFLED = 0.2
"""Share of the words that are shuffled, in the corpus that is worse."""
CHARACTERS = 2_000
"""Characters of a document, about; it ends with a paragraph."""
CONTEXT, BATCH = 128, 16
LR, WARMUP = 4e-3, 0.1


@dataclass(frozen=True)
class Setup:
    """The numbers of a trial that all trials share."""

    texts: str
    folder: str
    vocab: int
    fixed: int
    steps: int
    seeds: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="folder of .txt or .txt.gz files")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3, help="models of each corpus")
    parser.add_argument("--steps", type=int, default=250, help=f"of {CONTEXT * BATCH} tokens")
    parser.add_argument("--fixed", type=int, default=300, help="documents of the fixed set")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    folder = options.work.resolve() / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        texts=str(options.texts.resolve()),
        folder=str(folder),
        vocab=1024,
        fixed=options.fixed,
        steps=options.steps,
        seeds=options.seeds,
    )
    make_tokenizer(setup)
    with process_pool(options.cores) as pool:
        found = list(pool.map(trial, [setup] * options.trials, range(options.trials)))
    tell(found, setup, options.results)


def tell(found: Sequence[dict[str, Any]], setup: Setup, results: Path) -> None:
    settings = {"trials": len(found), "seeds": setup.seeds, "steps": setup.steps, "fixed": setup.fixed}
    report = Report("calibration", "How often compare says that a corpus is better", settings)
    report.text(
        f"{len(found)} trials: models of two layers, 64 wide, trained on {setup.steps * CONTEXT * BATCH:,} tokens of "
        f"two random halves of {found[0]['documents']:,} documents, and of the second half with {SHUFFLED:.0%} of its "
        f"words shuffled; scored on {setup.fixed} other documents. A model of another half is another model, and may "
        "be a better one: that `models` finds some is no fault. Between corpora that are halves of one, nothing should "
        f"be found in more than {LEVEL:.0%}."
    )
    rows = []
    for pair, what in (
        ("halves", "two halves of one corpus"),
        ("shuffled", "with a fifth of the words shuffled"),
    ):
        for test in found[0][pair]:
            trials = [one[pair][test] for one in found]
            said = sum(one["p"] < LEVEL for one in trials)
            interval = binomtest(said, len(trials)).proportion_ci()
            right = sum(one["p"] < LEVEL and one["difference"] > 0 for one in trials)
            apart = float(np.mean([abs(one["difference"]) for one in trials]))
            share = f"{said / len(trials):.1%} ({interval.low:.1%} to {interval.high:.1%})"
            rows.append([what, test, len(trials), said, share, right, apart])
    header = (
        "second corpus",
        "test",
        "pairs",
        "said to differ",
        "share (95%)",
        "first better",
        "bits per byte apart",
    )
    report.table("tests", header, rows)
    report.data["trials"] = list(found)
    report.write(results)


def trial(setup: Setup, number: int) -> dict[str, Any]:
    """Train on two halves and on a damaged one; return the p-value and difference of each test."""
    torch.set_num_threads(1)
    chance = np.random.default_rng(number)
    texts = documents(setup.texts)
    order = chance.permutation(len(texts))
    fixed, rest = order[: setup.fixed], order[setup.fixed :]
    halves = [[texts[place] for place in half] for half in np.array_split(rest, 2)]
    corpora = [*halves, [shuffled(text, chance) for text in halves[1]]]
    scored = [texts[place] for place in fixed]
    sizes = np.array([len(text.encode()) for text in scored], np.float64)
    first, *others = (bits_of(setup, corpus, scored, number) for corpus in corpora)
    return {
        "documents": len(texts),
        **{
            name: tests(first, other, sizes)
            for name, other in zip(("halves", "shuffled"), others, strict=True)
        },
    }


def tests(first_SD: Floats, second_SD: Floats, sizes_D: Floats) -> dict[str, dict[str, float]]:
    """Make each test that there is for so many seeds."""
    [models] = paired_bootstrap((second_SD[0] - first_SD[0])[None], sizes_D)
    found = {"models": models}
    for seeds in range(2, len(first_SD) + 1):
        parts = [bits[:seeds] for bits in (first_SD, second_SD)]
        mean, other = (bits.sum(axis=1) / sizes_D.sum() for bits in parts)
        more_D = parts[1].mean(axis=0) - parts[0].mean(axis=0)
        found[f"corpora, {seeds} seeds each"] = seeds_test(mean, other, more_D, sizes_D)
    return {name: {"p": one.p_value, "difference": one.difference} for name, one in found.items()}


def bits_of(setup: Setup, corpus: Sequence[str], scored: Sequence[str], number: int) -> Floats:
    """Return the bits ``(seeds, D)`` that models trained on a corpus need for documents."""
    tokenizer = load_tokenizer(Path(setup.folder))
    end = end_of_text(tokenizer)
    stream = np.concatenate(
        [[end, *encoding.ids] for encoding in tokenizer.encode_batch_fast(list(corpus))]
    ).astype(np.int64)
    given = [
        (f"{place}", np.array(encoding.ids, np.int64))
        for place, encoding in enumerate(tokenizer.encode_batch_fast(list(scored)))
    ]
    sizes = token_bytes(Path(setup.folder))
    rows = []
    for seed in range(setup.seeds):
        model = trained(stream, setup, seed=1000 * number + seed)
        found = score_documents(
            Replicas([model]), given, sizes=sizes, end=end, progress=lambda done, total: None
        )
        rows.append([one["text_nats"] / math.log(2) for one in found])
    return np.array(rows)


def trained(stream: NDArray[np.int64], setup: Setup, seed: int) -> Transformer:
    """Train a model on windows that are drawn from a stream of tokens, by AdamW with warm-up and cosine."""
    torch.manual_seed(seed)
    chance = np.random.default_rng(seed)
    model = Transformer(
        ModelConfig(vocab_size=setup.vocab, layers=2, heads=4, width=64, context=CONTEXT), seed=seed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, int(WARMUP * setup.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / (setup.steps - warm))
        ),
    )
    for _ in range(setup.steps):
        starts = chance.integers(0, len(stream) - CONTEXT - 1, BATCH)
        windows = torch.from_numpy(stream[starts[:, None] + np.arange(CONTEXT + 1)])
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def shuffled(text: str, chance: np.random.Generator) -> str:
    """Return a text in which some words have changed places with each other."""
    words = text.split(" ")
    places = chance.permutation(len(words))[: int(SHUFFLED * len(words))]
    moved = [words[place] for place in chance.permutation(places)]
    for place, word in zip(places, moved, strict=True):
        words[place] = word
    return " ".join(words)


def make_tokenizer(setup: Setup) -> None:
    """Train the tokenizer that all models share, on all documents."""
    tokenizer = train(documents(setup.texts), TokenizerConfig(vocab_size=setup.vocab))
    tokenizer.save(str(Path(setup.folder) / "tokenizer.json"))


@cache
def documents(texts: str) -> list[str]:
    """Return the texts of a folder, cut into documents."""
    return [one for path in sorted(Path(texts).glob("*.txt*")) for one in cut(read(path))]


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def cut(text: str) -> Iterator[str]:
    """Cut a text behind the paragraphs with which a document is long enough."""
    held = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        held += paragraph + "\n\n"
        if len(held) >= CHARACTERS:
            yield held
            held = ""


if __name__ == "__main__":
    main()
