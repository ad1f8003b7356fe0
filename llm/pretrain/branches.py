"""Branch points: checkpoints that are sealed with a training (`keep`), from which others go on.

Another training goes on from one where it would take the same steps up to there: where all that these follow from is
the same, which is the inputs, the settings but for how long training lasts, and of each step what it reads and its
rate. A branch point's key is a hash of that. So what comes out is what a training from nothing makes, to the bit.
No torch here: a plan looks for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.files import atomic_path

FOLDER, INDEX, PREFIX = "branches", "index.json", "step-"
VERSION = 2
"""The stage's: what another version of it made is not gone on from."""
LATER = ("tokens", "schedule", "keep")
"""Settings that say how long training lasts, and how its steps go: each step's are in the key by themselves."""


@dataclass(frozen=True)
class Course:
    """All that the steps of a training follow from, but its inputs."""

    identity: Mapping[str, Any]
    steps: int
    described: Callable[[int], str]
    """Step, from 0 -> what it reads, and its rate."""
    kept: Sequence[int]
    """Numbers of steps after which a branch point is kept."""

    def keys(self, inputs: Mapping[str, str], steps: Iterable[int]) -> dict[int, str]:
        """Return the training's keys after some numbers of steps.

        Args:
            inputs: type of an input -> its fingerprint.
        """
        settings = {name: value for name, value in self.identity.items() if name not in LATER}
        described = json.dumps([VERSION, settings, sorted(inputs.items())], sort_keys=True, allow_nan=False)
        running, wanted, found = hashlib.sha256(described.encode()), set(steps), {}
        for step in range(max(wanted, default=0)):
            running.update(f"{self.described(step)}\n".encode())
            if step + 1 in wanted:
                found[step + 1] = running.hexdigest()[:32]
        return found


def write_index(course: Course, inputs: Mapping[str, str], out: Path) -> None:
    """Write the keys of the branch points in an artifact."""
    with atomic_path(out / FOLDER / INDEX) as path:
        named = {f"{PREFIX}{step:08d}": key for step, key in course.keys(inputs, course.kept).items()}
        path.write_text(json.dumps(named, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def find(made: Path, course: Course, inputs: Mapping[str, str]) -> dict[int, Path]:
    """Find the branch points that a training passes: step -> the folder of its checkpoint.

    Args:
        made: the folder of all trainings that are sealed.
    """
    known: dict[int, dict[str, Path]] = {}
    for index in sorted(made.glob(f"*/{FOLDER}/{INDEX}")):
        if index.parents[1].suffix != ".partial":
            for name, key in json.loads(index.read_text(encoding="utf-8")).items():
                known.setdefault(int(name.removeprefix(PREFIX)), {}).setdefault(key, index.parent / name)
    passed = course.keys(inputs, (step for step in known if step < course.steps))
    return {step: known[step][key] for step, key in passed.items() if key in known[step]}


def newest(found: Mapping[int, Path], course: Course) -> int | None:
    """Return the last step that a training can go on from: all that it is to keep until there must be there too."""
    return max(
        (step for step in found if all(one in found for one in course.kept if one <= step)), default=None
    )
