"""Cost of tracking and orchestration: a run through Prefect and MLflow, beside the same bodies called directly."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Contestant, Runs, alternate, run_once
from benchmarks.report import Report, arguments
from benchmarks.whole_run import directly, through
from flows.engine.ports import free_port
from flows.prefect.up import Up, Wanted, stop

LITTLE = "pretrain.tokens=40960"
"""Ten steps: a run that hardly trains, so that the machine's drift is small beside what a run costs."""
SHARE = 0.03
"""Share of a run that they may cost."""


def main() -> None:
    parser = arguments(__doc__, megabytes=24, peer_megabytes=0, repeats=7)
    parser.add_argument("--whole-repeats", type=int, default=3, help="runs of each that train to the end")
    options = parser.parse_args()
    folder = options.work.resolve() / "orchestration"
    shutil.rmtree(folder, ignore_errors=True)
    size = int(options.megabytes * 1e6)
    job = {
        "settings": [f"download.sources.0.max_bytes={size}"],
        "work": str(folder),
        "cores": options.cores,
    }
    with servers(folder / "servers") as (environment, processes):

        def contestant(name: str, prepare: Callable[..., Any], **more: Any) -> Contestant:
            return Contestant(
                name=name, prepare=prepare, job={**job, **more}, text_bytes=size, cores=options.cores
            )

        whole = [
            contestant("the bodies called directly", directly, servers=processes),
            contestant("llmill, servers up", through, servers=processes, environment=environment),
            replace(contestant("llmill, on its own", through, environment={}), repeats=1),
        ]
        little = [little_training(one) for one in whole[:2]]
        for one in little:  # compiles kernels, fills caches, and takes servers past their first requests
            run_once(Runs(one), folder / "logs")
        little_runs = alternate(little, options.repeats, folder / "logs")
        whole_runs = alternate(whole, options.whole_repeats, folder / "logs")
    report = Report("orchestration", "What tracking and orchestration cost", {"settings": job["settings"]})
    report.text(
        "The quickstart recipe from sources to an exported model, on new homes in turns, and the same with a training "
        "of ten steps only. The clock starts when all is imported. Directly: each body on its folders, a local pool, "
        "the same launcher; nothing is sealed, nobody is told. Each other run is set beside the direct one of its "
        "turn, and differences are medians of these pairs, for the machine drifts. With servers up: Prefect's and "
        "MLflow's as `llmill up` keeps them (SQLite). On its own: the run brings its Prefect server up and down, and "
        "writes MLflow's SQLite file itself. CPU: processor time of all processes, the servers' too. A step: of the "
        "training, the median of each run."
    )
    tell_of_runs(report, "little", little_runs)
    tell_of_runs(report, "whole", whole_runs)
    tell_of_parts(report, little_runs, whole_runs)
    report.write(options.results)
    shutil.rmtree(folder)


def little_training(one: Contestant) -> Contestant:
    job = {**one.job, "settings": [*one.job["settings"], LITTLE]}
    return replace(one, name=f"{one.name}, ten steps", job=job)


def tell_of_runs(report: Report, key: str, all_runs: Sequence[Runs]) -> None:
    """A table of runs of one length, beside the directly called bodies, which are the first."""
    bare = all_runs[0].seconds
    header = ("", "runs", "median s", "spread s", "more than its pair, s", "of the run %", "outside of the bodies, s",
              "CPU s", "ms a step")  # fmt: skip
    rows = []
    for runs in all_runs:
        more = pairs(bare, runs.seconds)
        rest = [one["rest"] for one in runs.results if "rest" in one]
        rows.append(
            (
                runs.contestant.name,
                len(runs.seconds),
                runs.median,
                max(runs.seconds) - min(runs.seconds),
                statistics.median(seconds for seconds, _ in more),
                statistics.median(share for _, share in more),
                statistics.median(rest) if rest else None,
                middle(runs, lambda one: one["cpu"]),
                1000 * middle(runs, lambda one: one["step"]),
            )
        )
    report.table(key, header, rows)
    report.data[f"{key}_seconds"] = {runs.contestant.name: runs.seconds for runs in all_runs}
    report.data[f"{key}_results"] = {runs.contestant.name: runs.results for runs in all_runs}


def tell_of_parts(report: Report, little: Sequence[Runs], whole: Sequence[Runs]) -> None:
    """Report what any run costs, and what each second of its training costs; from both, what the quickstart does."""
    more = sorted(seconds for seconds, _ in pairs(little[0].seconds, little[1].seconds))
    fixed = statistics.median(more)
    bare, told = (beside(*both) for both in zip(little, whole[:2], strict=True))
    training = max(0.0, told - bare)
    seconds = middle(whole[0], lambda one: one["training"]["seconds"])
    cost = fixed + training * seconds
    report.data["parts"] = {
        "fixed_seconds": fixed,
        "fixed_seconds_of_pairs": more,
        "beside_training": {"directly": bare, "told": told},
        "share_of_whole": cost / (whole[0].median + cost),
    }
    report.text(
        f"Two whole runs differ by what a step happens to take, which is more than what is looked for. By parts: a "
        f"run that hardly trains takes {fixed:.1f} s more (median of {len(more)} pairs, {more[0]:.1f} to "
        f"{more[-1]:.1f}). For each further second of training, the process that tells and the servers take "
        f"{1000 * told:.1f} ms of processor time, {1000 * bare:.1f} where nobody is told. Training's threads wait for "
        f"one another, so the difference is counted as lost by all of them: {100 * training:.2f}% of it."
    )
    report.text(
        f"So of the quickstart's {whole[0].median:.0f} s, tracking and orchestration take {cost:.1f} s: "
        f"{100 * cost / (whole[0].median + cost):.1f}% of the run. " + beyond(fixed, training)
    )


def beside(little: Runs, whole: Runs) -> float:
    """Processor time of the process that runs the bodies and of the servers, in seconds for each one of training.

    From runs of two lengths, so that it holds nothing of a training's start and end.
    """
    used, trained = (
        middle(whole, of) - middle(little, of)
        for of in (lambda one: one["training"]["beside"], lambda one: one["training"]["seconds"])
    )
    return used / trained


def beyond(fixed: float, training: float) -> str:
    """Say from when on a run costs no more than its share."""
    if training >= SHARE:
        return f"It is above {SHARE:.0%} for a run of any length."
    seconds = fixed / (SHARE - training)
    return f"It is under {SHARE:.0%} for runs of more than {seconds:.0f} s."


def pairs(bare: Sequence[float], tracked: Sequence[float]) -> list[tuple[float, float]]:
    """Return how much longer a tracked run took than the direct one of its turn: in seconds, and in percent of it."""
    return [(more - less, 100 * (more - less) / more) for less, more in zip(bare, tracked, strict=False)]


def middle(runs: Runs, of: Callable[[dict[str, Any]], float]) -> float:
    """Return the median over runs of a metric that each of them reported."""
    return statistics.median(map(of, runs.results))


@contextmanager
def servers(home: Path) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Servers that stay up for all runs, as a team has them: the environment that leads to them, their processes."""
    wanted = Wanted(prefect_port=free_port(), mlflow_port=free_port(), pools=())
    up = Up(home, wanted, print)
    home.mkdir(parents=True)
    up.start()
    try:
        environment = up.client_environment()
        used = {name: environment[name] for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
        yield used, [process.pid for process in up.services.processes.values()]
    finally:
        stop(home)


if __name__ == "__main__":
    main()
