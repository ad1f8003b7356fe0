"""``llmill`` with a download that never ends by itself (``python -m tests.endless_stage KIND``): its ``parts`` wait,
or the body computes where no handler of Python's runs (``native``).
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import stages


def wait(flag: Path) -> None:
    flag.touch()
    time.sleep(3600)


def parts(config: Any, inputs: Mapping[str, Path], out: Path, context: Any) -> Any:
    context.map(wait, [out / f"at-work-{number}" for number in range(context.workers)])


def native(config: Any, inputs: Mapping[str, Path], out: Path, context: Any) -> Any:
    (out / "at-work").touch()
    hashlib.pbkdf2_hmac("sha256", b"endless", b"salt", 2_000_000_000)


def plant(kind: str) -> None:
    body = {"parts": parts, "native": native}[kind]
    object.__setattr__(
        stages.BY_NAME["download"], "body", body
    )  # all that was imported holds this very object


if __name__ == "__main__":
    from tests import endless_stage

    endless_stage.plant(sys.argv.pop(1))
    from flows.cli.main import main

    main()
