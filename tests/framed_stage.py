"""``llmill`` with a download that writes down the frames of ours by which it was reached."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import stages

ROOT = Path(__file__).resolve().parents[1]


def framed(config: Any, inputs: Mapping[str, Path], out: Path, context: Any) -> dict[str, float]:
    stack = traceback.extract_stack()[:-1]
    ours = [
        (frame.filename, frame.name)
        for frame in stack
        if any(frame.filename.startswith(f"{ROOT / room}/") for room in ("flows", "llm", "data_pipeline"))
    ]
    (out / "frames.json").write_text(json.dumps(ours, allow_nan=False))
    return {"documents": 0.0, "bytes": 0.0}


if __name__ == "__main__":
    object.__setattr__(stages.BY_NAME["download"], "body", framed)
    from flows.cli.start import main

    main()
