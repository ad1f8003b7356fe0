"""What tracking and orchestration cost: a run through Prefect and MLflow, beside the same bodies called directly."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Contestant, Runs, alternate, run_once
from benchmarks.report import Report, arguments
from benchmarks.whole_run import directly, through
from flows.servers import free_port
from flows.services import Up, Wanted, stop


def main() -> None:
    parser = arguments(__doc__, megabytes=24, peer_megabytes=0, repeats=3)
    parser.add_argument("--tokens", type=int, default=0, help="tokens to train on; 0: what the recipe says")
    options = parser.parse_args()
    folder = options.work.resolve() / "orchestration"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"download.sources.0.max_bytes={int(options.megabytes * 1e6)}"]
    settings += [f"pretrain.tokens={options.tokens}"] if options.tokens else []
    with servers(folder / "servers") as (environment, processes):
        job = {"settings": settings, "work": str(folder), "cores": options.cores}
        size = int(options.megabytes * 1e6)
        contestants = [
            Contestant("the bodies called directly", directly, job, size, options.cores),
            Contestant(
                "llmill, servers up",
                through,
                {**job, "environment": environment, "servers": processes},
                size,
                options.cores,
            ),
            Contestant(
                "llmill, on its own", through, {**job, "environment": {}}, size, options.cores, repeats=1
            ),
        ]
        warm_up(contestants[:2], folder / "logs")
        all_runs = alternate(contestants, options.repeats, folder / "logs")
    bare = all_runs[0].seconds
    cpu, step = (
        [statistics.median(one[part] for one in runs.results) for runs in all_runs]
        for part in ("cpu", "step")
    )
    report = Report("orchestration", "What tracking and orchestration cost", {"settings": settings})
    report.text(
        "The quickstart recipe from sources to an exported model, on new homes in turns. The clock starts "
        "when all is imported. Directly: each body on its folders, a local pool, the same launcher; nothing "
        "is sealed, nobody is told. Each other run is set beside the direct one of its turn, and differences "
        "are medians of these pairs, for the machine drifts. With servers up: Prefect's and MLflow's as "
        "`llmill up` keeps them (SQLite). On its own: the run brings its Prefect server up and down, and "
        "writes MLflow's SQLite file itself. CPU: processor time of all processes, the servers' too. A step: "
        "of the training, the median of each run; it would tell of threads that send, and of servers that "
        "take, while it trains."
    )
    report.table(
        "runs",
        (
            "",
            "runs",
            "median s",
            "spread s",
            "more than its pair, s",
            "of the run %",
            "CPU s",
            "ms a step",
        ),
        [
            [
                runs.contestant.name,
                len(runs.seconds),
                runs.median,
                max(runs.seconds) - min(runs.seconds),
                statistics.median(more for more, _ in pairs(bare, runs.seconds)),
                statistics.median(share for _, share in pairs(bare, runs.seconds)),
                used,
                1000 * one_step,
            ]
            for runs, used, one_step in zip(all_runs, cpu, step, strict=True)
        ],
    )
    for runs in all_runs[1:]:
        rest = [one["rest"] for one in runs.results]
        share = [100 * one / seconds for one, seconds in zip(rest, runs.seconds, strict=True)]
        report.text(
            f"{runs.contestant.name}: {statistics.median(rest):.1f} s outside of the bodies, "
            f"{statistics.median(share):.1f}% of the run (medians)."
        )
    report.data["seconds"] = {runs.contestant.name: runs.seconds for runs in all_runs}
    report.data["results"] = {runs.contestant.name: runs.results for runs in all_runs}
    report.write(options.results)
    shutil.rmtree(folder)


def pairs(bare: Sequence[float], tracked: Sequence[float]) -> list[tuple[float, float]]:
    """How much longer a tracked run took than the direct one of its turn: in seconds, and in percent of it."""
    return [(more - less, 100 * (more - less) / more) for less, more in zip(bare, tracked, strict=False)]


def warm_up(contestants: Sequence[Contestant], logs: Path) -> None:
    """Run each once on little: kernels are compiled then, files cached, and the servers past their first requests."""
    for one in contestants:
        little = [*one.job["settings"], "pretrain.tokens=40960"]
        run_once(
            Runs(replace(one, name=f"{one.name}, to warm up", job={**one.job, "settings": little})), logs
        )


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
