"""One run of one contestant, as `benchmarks.measure` starts it: bind to cores, prepare, time the work."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from benchmarks.measure import NOT_INSTALLED, bind


def main(function: str, cores: str, job: str, result: str) -> None:
    bind(int(cores))  # first, since libraries count cores when they are imported
    module, name = function.split(":")
    prepare = getattr(importlib.import_module(module), name)
    try:
        work = prepare(**json.loads(Path(job).read_text()))
    except ModuleNotFoundError as error:
        print(f"not installed: {error.name}", flush=True)
        sys.exit(NOT_INSTALLED)
    start = time.perf_counter()
    outcome = work()
    seconds = time.perf_counter() - start
    Path(result).write_text(json.dumps({"seconds": seconds, "result": outcome}, allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
