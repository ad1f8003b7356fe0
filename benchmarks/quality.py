"""Quality of dedup, against true Jaccard by brute force: on versions of packages, and on planted near-duplicates."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import ours, peers
from benchmarks.corpus import columns, installed_text, kept
from benchmarks.measure import Contestant, Work, alternate
from benchmarks.report import Report, arguments
from data_pipeline.core.errors import UserError
from data_pipeline.core.text import last_lines
from data_pipeline.dedup.config import DedupConfig
from data_pipeline.documents import write_shard

NEAR, SURVIVOR = 0.8, 0.7
"""Pairs at or above NEAR should not survive together; what is removed should have a survivor at SURVIVOR or above."""
BUCKETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
RELEASES = {
    "django": ("4.2.16", "5.0.9", "5.1.4", "5.2.4"),
    "networkx": ("3.2.1", "3.3", "3.4.2"),
    "sympy": ("1.12.1", "1.13.3", "1.14.0"),
    "nltk": ("3.8.1", "3.9.1"),
    "sphinx": ("7.4.7", "8.0.2", "8.1.3"),
    "mpmath": ("1.2.1", "1.3.0"),
}
SHARDS = 4
SHORTEST = 20
"""Words of a planted document, at least."""

Named = tuple[str, str]
"""Id and text."""


@dataclass(frozen=True)
class Pairs:
    """All pairs of documents with a true Jaccard similarity of at least ``BUCKETS[0]``: rows and similarity."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    jaccard: NDArray[np.float64]


def main() -> None:
    parser = arguments(__doc__, megabytes=100, peer_megabytes=100, repeats=1)
    parser.add_argument("--planted", type=int, default=400, help="documents that near-duplicates are made of")
    parser.add_argument("--no-natural", action="store_true", help="planted ones only (nothing is downloaded)")
    options = parser.parse_args()
    corpora = {"planted": planted(options.work, options.planted)}
    if not options.no_natural:
        corpora = {"natural": releases(options.work, options.megabytes)} | corpora
    report = Report(
        "quality", "Quality of dedup", {"near": NEAR, "survivor": SURVIVOR, "ngram": peers.SHINGLE}
    )
    report.text(
        f"Every contestant removes duplicates from the same documents; the true Jaccard similarity of all pairs, by "
        f"brute force over exact sets of {peers.SHINGLE}-word shingles, says how well. Missed: of the pairs at "
        f"{NEAR} or above, those of which both survive. Wrong: of the removed documents, those without a survivor at "
        f"{SURVIVOR} or above. Natural: files of several releases of {', '.join(RELEASES)}. Planted: files of "
        "installed packages with words replaced at random, some of the copies copied and edited again."
    )
    for name, corpus in corpora.items():
        judge(report, name, corpus, options)
    report.write(options.results)


def judge(report: Report, name: str, corpus: Path, options: Any) -> None:
    """Run all contestants on a corpus and add their tables."""
    outs = options.work.resolve() / "quality" / name
    table = columns(corpus, ("id", "text"))
    ids = table["id"].to_pylist()
    sizes, pairs = true_pairs(table["text"].to_pylist())
    all_runs = alternate(contestants(corpus, outs, options.cores, not options.no_peers), 1, outs / "logs")
    rows, by_bucket = [], {}
    for runs in all_runs:
        if runs.missing:
            continue
        left = np.isin(ids, peers.kept_ids(Path(runs.contestant.job["out"], "run")))
        rows.append([runs.contestant.name, *verdict(left, sizes, pairs)])
        by_bucket[runs.contestant.name] = survivors_by_bucket(left, pairs)
    report.text(
        f"## {name.capitalize()}\n\n{len(ids)} documents, {len(pairs.left)} pairs at {BUCKETS[0]} or above.\n"
    )
    header = ("", "removed", "near pairs", "missed", "missed %", "wrong", "wrong %")
    report.table(name, header, rows)
    report.text("Share of pairs that survive together, by their true similarity:")
    labels = [f"{low:g}-{high:g}" for low, high in pairwise(BUCKETS)] + ["1"]
    report.table(f"{name}_by_similarity", ("", *labels), [[key, *row] for key, row in by_bucket.items()])
    shutil.rmtree(outs)


def contestants(corpus: Path, outs: Path, cores: int, with_peers: bool) -> list[Contestant]:
    """llmill and its peers; datatrove with llmill's bands, and as it comes."""
    config = DedupConfig()
    lsh = {"bands": config.bands, "rows": config.rows}

    def contestant(name: str, prepare: Callable[..., Work], **job: Any) -> Contestant:
        job |= {"corpus": str(corpus), "out": str(outs / name.replace(" ", "-")), "workers": cores}
        return Contestant(name=name, prepare=prepare, job=job, text_bytes=0, cores=cores)

    found = [contestant("llmill", ours.remove_duplicates, config={})]
    if with_peers:
        bands = f"{config.bands} bands of {config.rows}"
        found += [
            contestant(f"datatrove, {bands}, same words", peers.datatrove_dedup, tokenizer="same", **lsh),
            contestant(
                "datatrove, 14 bands of 8, same words",
                peers.datatrove_dedup,
                tokenizer="same",
                bands=14,
                rows=8,
            ),
            contestant(f"text-dedup, {bands}", peers.text_dedup, **lsh),
        ]
    return found


def verdict(
    left: NDArray[np.bool_], sizes: NDArray[np.int64], pairs: Pairs
) -> tuple[int, int, int, float, int, float]:
    """Removed, near pairs, missed (and %), wrong (and %) of a contestant that left the documents of the mask ``left``.

    Documents without a word count for nothing.
    """
    near = pairs.jaccard >= NEAR
    missed = int((near & left[pairs.left] & left[pairs.right]).sum())
    best = np.zeros(len(left))
    for removed, other in ((pairs.left, pairs.right), (pairs.right, pairs.left)):
        with_survivor = left[other]
        np.maximum.at(best, removed[with_survivor], pairs.jaccard[with_survivor])
    removed_mask = ~left & (sizes > 0)
    removals, total = int(removed_mask.sum()), int(near.sum())
    wrong = int((removed_mask & (best < SURVIVOR)).sum())
    return removals, total, missed, 100 * missed / max(1, total), wrong, 100 * wrong / max(1, removals)


def survivors_by_bucket(left: NDArray[np.bool_], pairs: Pairs) -> list[float | None]:
    """Share of the pairs in each interval of `BUCKETS`, and of those at 1, of which both survive."""
    both = left[pairs.left] & left[pairs.right]
    interval = np.searchsorted(BUCKETS, pairs.jaccard, side="right") - 1
    return [
        float(both[interval == at].mean()) if (interval == at).any() else None for at in range(len(BUCKETS))
    ]


def true_pairs(texts: Sequence[str], block: int = 256) -> tuple[NDArray[np.int64], Pairs]:
    """Number of distinct shingles of each text, and all pairs that are similar; every pair is computed.

    The matrix of documents and shingles times its transpose counts what each two have in common.
    """
    from scipy import sparse

    numbers: dict[tuple[str, ...], int] = {}
    rows = [sorted({numbers.setdefault(one, len(numbers)) for one in shingles(text)}) for text in texts]
    sizes = np.array([len(row) for row in rows], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    flat = np.fromiter((one for row in rows for one in row), np.int64, starts[-1])
    matrix = sparse.csr_array(
        (np.ones(len(flat), np.int32), flat, starts), shape=(len(rows), max(1, len(numbers)))
    )
    transposed = matrix.T.tocsr()
    found: list[tuple[NDArray[Any], ...]] = []
    for start in range(0, len(rows), block):
        common = (matrix[start : start + block] @ transposed).tocoo()
        one, other = common.coords[0].astype(np.int64) + start, common.coords[1].astype(np.int64)
        jaccard = common.data / (sizes[one] + sizes[other] - common.data)
        wanted = (one < other) & (jaccard >= BUCKETS[0])
        found.append((one[wanted], other[wanted], jaccard[wanted]))
    left, right, jaccard = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return sizes, Pairs(left, right, jaccard)


def shingles(text: str) -> set[tuple[str, ...]]:
    """The 5-word shingles of a text, words lower-cased; all its words as one where it has fewer; none without words."""
    words = peers.words_of(text.lower())
    if not words:
        return set()
    width = min(peers.SHINGLE, len(words))
    return {tuple(words[at : at + width]) for at in range(len(words) - width + 1)}


def planted(work: Path, count: int) -> Path:
    """Files of installed packages, each with copies in which a random share of the words is replaced."""

    def build(out: Path) -> None:
        texts = [text for text in columns(base, ("text",))["text"].to_pylist() if long_enough(text)]
        random = np.random.default_rng(0)
        chosen = random.choice(len(texts), min(count, len(texts)), replace=False)
        write_documents(out, [named for at in chosen for named in family(texts[at], f"text-{at}", random)])

    base = installed_text(work, 20)
    return kept(work / f"planted-{count}", build)


def long_enough(text: str) -> bool:
    return SHORTEST <= len(peers.WORD.findall(text)) <= 5000


def family(text: str, name: str, random: np.random.Generator) -> list[Named]:
    """A text and five edited copies: three of it, then two of the third, each of the one before (a chain)."""
    members = [(name, text)]
    for copy in range(5):
        parent = text if copy < 3 else members[-1][1]
        members.append((f"{name}/copy-{copy}", replace_words(parent, random.uniform(0.002, 0.05), random)))
    return members


def replace_words(text: str, share: float, random: np.random.Generator) -> str:
    """``text`` with a random ``share`` of its words replaced by words that occur nowhere else."""

    def replaced(match: Any) -> str:
        return f"w{random.integers(1 << 40)}" if random.random() < share else match[0]

    return peers.WORD.sub(replaced, text)


def releases(work: Path, megabytes: float) -> Path:
    """The Python files of several releases of packages, ``megabytes`` at most, as documents."""

    def build(out: Path) -> None:
        documents: list[Named] = []
        size = 0.0
        for package, versions in RELEASES.items():
            for version in versions:
                for named in wheel_texts(
                    download_wheel(work / "wheels", package, version), f"{package}-{version}"
                ):
                    size += len(named[1]) / 1e6
                    if size > megabytes:
                        break
                    documents.append(named)
        write_documents(out, documents)

    return kept(work / f"releases-{megabytes:g}", build)


def download_wheel(folder: Path, package: str, version: str) -> Path:
    """The wheel of a release, fetched by pip into ``folder`` where it isn't there.

    Raises:
        UserError: pip can't get it.
    """
    pattern = f"{package}-{version}-*.whl"
    if not [*folder.glob(pattern), *folder.glob(pattern.capitalize())]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(folder), f"{package}=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(
                f"pip can't download {package} {version}: {last_lines(done.stderr, 1)}\n"
                "run with --no-natural to judge by planted near-duplicates alone"
            )
    return next(iter([*folder.glob(pattern), *folder.glob(pattern.capitalize())]))


def wheel_texts(wheel: Path, name: str) -> Iterable[Named]:
    """The Python files in a wheel that are valid UTF-8 and not empty."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if member.endswith(".py"):
                try:
                    text = archive.read(member).decode()
                except UnicodeDecodeError:
                    continue
                if text.strip():
                    yield f"{name}/{member}", text


def write_documents(out: Path, documents: Sequence[Named]) -> None:
    """Write documents into a few shards, dealt in turns, so that near-duplicates lie in different ones."""
    for number in range(SHARDS):
        with write_shard(out / f"documents-{number:05d}.parquet") as writer:
            for id, text in documents[number::SHARDS]:
                writer.add(id, text, "benchmark", "{}")


if __name__ == "__main__":
    main()
