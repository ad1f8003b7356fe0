"""EleutherAI's lm-evaluation-harness (Gao et al. 2024), run on a model as `transformers` loads it.

It scores with its own prompts, code and defaults, as ``lm_eval run --model hf`` does, so that its metrics can be held
against published ones. It is an extra: only this file imports it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path, once
from data_pipeline.core.text import first_line
from data_pipeline.stage import Metrics, StageContext
from llm.export.stage import write_loadable
from llm.model.foreign import ForeignModel, Scorable
from llm.score.config import HarnessConfig
from llm.score.report import section

MAX_LOGITS = 1 << 28
"""Logits of a batch at most, for the harness holds all of them (1 GB), and as many logarithms."""
MAX_BATCH = 16
IN_95_PERCENT = 1.959964
"""Standard errors from the middle to either end of a normal's 95% interval."""
PREFIX = "harness/"
"""Stands before the names of its metrics."""
FILES = ("json", "csv", "text", "parquet", "arrow")
"""Builders of `datasets` that read files that a task names."""


class Tasks(TaskManager):
    """The harness's tasks and those of a folder; each is loaded once."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(include_path=str(folder) if folder else None)
        self._loaded: dict[str, Any] = {}

    def load(self, task_list: Any) -> Any:
        """Load a task, group or tag, with its data; the harness calls it with a list of one.

        Raises:
            UserError: it is not known, can't be loaded, or reads files that are not in the folder.
            ConnectionError: the hub can't be reached.
        """
        [name] = task_list
        if name in self._loaded:
            return self._loaded[name]
        if name not in self.task_index:
            more = f" nor in {self.include_path}" if self.include_path else ""
            raise UserError(f"score.harness: no task {name} in lm-evaluation-harness{more}")
        try:
            found = super().load(task_list)
        except ConnectionError:
            raise
        except Exception as error:  # whatever datasets and a task's own code raise
            raise UserError(f"score.harness: {name} can't be loaded: {first_line(error)}") from error
        for task in found["tasks"].items():
            self._require_within(*task)
        return self._loaded.setdefault(name, found)

    def _require_within(self, name: str, task: Any) -> None:
        """See that what a task reads of this machine is in the folder, by whose content its scores are known."""
        dataset = str(task.config.dataset_path)
        named = (task.config.dataset_kwargs or {}).get("data_files") if dataset in FILES else dataset
        folder = Path(self.include_path or "").resolve()
        for path in local_files(named):
            if dataset not in FILES and not path.exists():
                continue  # a name on the hub
            if not (self.include_path and path.resolve().is_relative_to(folder)):
                raise UserError(
                    f"score.harness: {name} reads {path}, where a change would not be seen:\n"
                    f"move it into {self.include_path or 'a folder of tasks (include)'}"
                )


def local_files(named: Any) -> list[Path]:
    """Return the local ones of ``data_files`` as `datasets` takes them: a path, several, or some for each split."""
    if isinstance(named, str):
        return [] if "://" in named else [Path(named)]
    inner = named.values() if isinstance(named, Mapping) else named or ()
    return [path for one in inner for path in local_files(one)]


class Counter(CacheHook):
    """Counts the requests that a model answered, which the harness reports to whoever would keep the answers."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        super().__init__(None)
        self._done, self._progress = 0, progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._progress(self._done)


class Model(HFLM):
    """A model in a folder, which reports how far it is to a stage's context."""

    def __init__(self, folder: Path, context: StageContext) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained=str(folder), dtype="float32", device=device)
        self._context = context
        self.task = ""
        """The task that is being run."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        self._begin(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        self._begin(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        self._begin(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _begin(self, requests: Sequence[Instance]) -> None:
        """Choose how many sequences are scored at once, by what their logits may take, and count from 0."""
        texts = ("".join(text for text in one.args if isinstance(text, str)) for one in requests)
        longest = min(self.max_length, max(len(text.encode()) + 1 for text in texts))
        self.batch_size_per_gpu = max(1, min(MAX_BATCH, MAX_LOGITS // (longest * self.vocab_size)))
        unit = f"requests of {self.task}"
        self.set_cache_hook(Counter(lambda done: self._context.progress(done, len(requests), unit)))


class Notes(logging.Handler):
    """Reports what the harness warns of, each kind once with how often it came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: dict[tuple[str, int], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.setdefault((record.pathname, record.lineno), []).append(record.getMessage())

    @contextmanager
    def heard(self, context: StageContext) -> Iterator[None]:
        """Listen meanwhile, in place of standard error, and report at the end."""
        logger = logging.getLogger("lm_eval")
        before, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = before
            for first, *others in self._messages.values():
                more = f" (and {len(others):,} more such)" if others else ""
                context.note(f"lm-evaluation-harness: {' '.join(first.split())}{more}", warning=True)


Result = dict[str, Any]
"""Outcome of one of the names that were asked for: ``metrics``, those ``left_out``, ``versions`` and ``shots``."""


@dataclass(frozen=True)
class Harnessed:
    """A model on all of the harness's tasks that were asked for."""

    results: Sequence[Result]

    def metrics(self) -> Metrics:
        """All metrics, under names that none of ours has."""
        return {f"{PREFIX}{name}": value for one in self.results for name, value in one["metrics"].items()}

    def table(self) -> str:
        """Return the report's section, in Markdown."""
        rows = [row for one in self.results for row in rows_of(one)]
        header = ("task", "items", "shots", "metric", "value", "95% interval")
        return section("lm-evaluation-harness", header, rows)


def rows_of(result: Result) -> Iterator[tuple[str, ...]]:
    """Yield a row a metric."""
    metrics = result["metrics"]
    for name in (name for name in metrics if not name.endswith(("_low", "_high", "/items"))):
        task, _, metric = name.rpartition("/")
        low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        items = metrics.get(f"{task}/items")
        counts = ("" if items is None else f"{items:,.0f}", str(result["shots"].get(task, "")))
        yield task, *counts, metric, f"{metrics[name]:.4f}", interval


def run_harness(
    config: HarnessConfig, model: Scorable, tokenizer: Path, *, out: Path, context: StageContext
) -> Harnessed:
    """Score a model on the harness's tasks; leave ``harness.json`` in ``out``.

    What each task came to is kept in ``scratch``, for an attempt after a kill.

    Args:
        tokenizer: folder of the tokenizer.

    Raises:
        UserError: a task is not known, or can't be loaded; `transformers` has no layout for the model.
        ConnectionError: its data are on the hub, which can't be reached.
    """
    with Notes().heard(context):
        results = run_tasks(config, model, tokenizer, scratch=out / "scratch" / "harness", context=context)
    if left_out := [name for one in results for name in one["left_out"]]:
        context.note(f"no finite numbers, so left out: {', '.join(left_out)}", warning=True)
    with atomic_path(out / "harness.json") as path:
        path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Harnessed(results)


def run_tasks(
    config: HarnessConfig, model: Scorable, tokenizer: Path, *, scratch: Path, context: StageContext
) -> list[Result]:
    """Run one task after the other; those whose results are in ``scratch`` already are not run again."""
    tasks = Tasks(config.include)
    for name in config.tasks:  # before the first is run
        tasks.load([name])
    loaded = Model(loadable(model, tokenizer, scratch / "model"), context)

    def run(name: str) -> Result:
        loaded.task, limit = name, config.max_items
        return summary(
            simple_evaluate(loaded, tasks=[name], task_manager=tasks, limit=limit, log_samples=False)
        )

    return [once(scratch / f"{number}.json", partial(run, name)) for number, name in enumerate(config.tasks)]


def loadable(model: Scorable, tokenizer: Path, scratch: Path) -> Path:
    """Return a folder with a model that `transformers` loads: the model's own, or one that is written."""
    if isinstance(model, ForeignModel):
        return model.folder
    scratch.mkdir(parents=True, exist_ok=True)
    write_loadable(model, tokenizer, scratch, "float32")
    return scratch


def summary(found: Mapping[str, Any]) -> Result:
    """Return the metrics of an evaluation with their 95% intervals, and its tasks' versions and shots.

    Those that are no finite numbers are named in ``left_out``.
    """
    metrics: Metrics = {}
    left_out = []
    for task, values in (found["results"] | found.get("groups", {})).items():
        for key, value in values.items():
            metric, _, rule = key.rpartition(",")
            if not metric or metric.endswith("_stderr"):
                continue
            name = re.sub(
                r"[^\w./ -]", "_", f"{task}/{metric}" if rule == "none" else f"{task}/{metric}.{rule}"
            )
            if not is_number(value):
                left_out.append(name)
                continue
            metrics[name] = float(value)
            if is_number(error := values.get(f"{metric}_stderr,{rule}")):
                reach = IN_95_PERCENT * float(error)
                metrics |= {f"{name}_low": value - reach, f"{name}_high": value + reach}
        if task in found["n-samples"]:
            metrics[f"{task}/items"] = float(found["n-samples"][task]["effective"])
    kept = {"versions": found["versions"], "shots": found["n-shot"]}
    return {"metrics": metrics, "left_out": left_out, **kept}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
