"""Download to tokens: time by stage, and what part of it each stage spends outside its hot loop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from benchmarks import ours
from benchmarks.corpus import text_bytes
from benchmarks.measure import ROOT, Contestant, Runs, alternate
from benchmarks.report import Report, arguments

RECIPE = ROOT / "flows" / "recipes" / "quickstart.yaml"
"""Says how source code is cleaned."""
INPUTS: dict[str, dict[str, str]] = {
    "download": {},
    "clean": {"documents": "download"},
    "dedup": {"documents": "clean"},
    "train_tokenizer": {"documents": "dedup"},
    "tokenize": {"documents": "dedup", "tokenizer": "train_tokenizer"},
}
"""Stage -> the stage that makes each type which it takes."""
WAITS = ("threading.", "concurrent.futures.", "multiprocessing.")
"""Functions in which the driver waits for workers."""


def main() -> None:
    options = arguments(__doc__, megabytes=500, peer_megabytes=0, repeats=1).parse_args()
    outs = options.work.resolve() / "pipeline"
    source = {"name": "python", "kind": "installed-python", "max_bytes": int(options.megabytes * 1e6)}
    configs: dict[str, dict[str, Any]] = {stage: {} for stage in INPUTS}
    configs["download"] = {"sources": [source]}
    configs["clean"] = yaml.safe_load(RECIPE.read_text())["clean"]
    all_runs = {}
    for stage, sources in INPUTS.items():
        job = {
            "stage": stage,
            "config": configs[stage],
            "inputs": {type_: str(outs / name) for type_, name in sources.items()},
            "out": str(outs / stage),
            "workers": options.cores,
        }
        size = text_bytes(outs / sources["documents"]) if sources else 0
        one = Contestant(name=stage, prepare=ours.watch_stage, job=job, text_bytes=size, cores=options.cores)
        (all_runs[stage],) = alternate([one], options.repeats, outs / "logs")
    report = Report("pipeline", "From download to tokens", {"stages": configs})
    report.text(
        f"Each stage on {options.cores} processes, whole: reading and writing shards, reports, everything. Its hot "
        "loop is the work on shards: the items of `context.map`. Outside of it, workers import modules, the driver is "
        "alone (planning, merging, reports; a tokenizer is learnt there, on threads), or workers are idle while "
        "others work or processes start. All in percent of seconds times cores."
    )
    report.admit_less(options.megabytes, text_bytes(outs / "download"))
    header = (
        "stage",
        "text MB",
        "seconds",
        "MB/s",
        "peak MB",
        "hot loop %",
        "importing %",
        "driver alone %",
        "workers idle %",
    )
    rows = [shares(stage, runs, outs, options.cores) for stage, runs in all_runs.items()]
    size, seconds = rows[0][1], sum(row[2] for row in rows)
    rows.append(["all", size, seconds, size / seconds, max(row[4] for row in rows), None, None, None, None])
    report.table("stages", header, rows)
    report.text("Where the time goes, by innermost Python function, native code that it calls included:")
    report.table(
        "functions", ("stage", "in the hot loop", "driver"), [functions(*one) for one in all_runs.items()]
    )
    report.data["runs"] = {stage: runs.results for stage, runs in all_runs.items()}
    report.write(options.results)
    shutil.rmtree(outs)


def shares(stage: str, runs: Runs, outs: Path, cores: int) -> list[Any]:
    """A row: text, seconds and speed of the median run, and what its cores' time went to, in percent."""
    found = sorted(runs.results, key=lambda result: float(result["seconds"]))[len(runs.results) // 2]
    seconds, size = found["seconds"], (runs.contestant.text_bytes or text_bytes(outs / stage)) / 1e6
    everything = seconds * cores
    importing = found["import_seconds"] / everything
    hot = found["item_seconds"] / everything - importing
    alone = 1 - found["map_seconds"] / seconds
    percent = (100 * share for share in (hot, importing, alone, 1 - hot - importing - alone))
    return [stage, size, seconds, size / seconds, max(runs.peak_bytes) / 1e6, *percent]


def functions(stage: str, runs: Runs) -> list[str]:
    """A row: the functions that most time went to, with their share of their process's time."""
    found = runs.results[0]
    return [stage, *(listed(found[key]) for key in ("item_profile", "driver_profile"))]


def listed(profile: dict[str, float], count: int = 5) -> str:
    """The first functions of a profile; those that wait left out."""
    working = {name: seconds for name, seconds in profile.items() if not name.startswith(WAITS)}
    total = sum(working.values())
    ranked = sorted(working.items(), key=lambda pair: -pair[1])[:count]
    return ", ".join(
        f"{name.removeprefix('data_pipeline.')} {100 * seconds / total:.0f}%" for name, seconds in ranked
    )


if __name__ == "__main__":
    main()
