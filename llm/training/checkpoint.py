"""Checkpoints in two phases: every rank writes its shard into ``step-00000050.tmp``, syncs it to disk, and leaves its
size and SHA-256; when all have, rank 0 records them, and only then is the folder renamed. So a folder with its final
name is whole unless the disk failed, and that the checksums show before anything is loaded. The newest whole one is
what a start continues from; a torn one is removed. There is no ``latest`` file that could be wrong, and nothing is
unpickled: shards are safetensors, records are JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path, file_sha256, fsync
from data_pipeline.core.text import human_bytes

RECORD = "checkpoint.json"
HISTORY = "history.json"
FORMAT = 2
"""Raised when what a checkpoint holds changes; others are not resumed."""


@dataclass(frozen=True)
class Setup:
    """Settings that decide the order of sums, and so the last bits of all that follows."""

    ranks: int
    zero_stage: int
    micro_batch: int
    precision: str
    device: str
    """"cpu" or "cuda"."""
    attention: str = "sdpa"
    matmul: str = "torch"
    sequence_parallel: int = 1
    tensor_parallel: int = 1
    offload: str = "none"
    compile: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """Self-description of a complete checkpoint."""

    step: int
    """Optimizer steps taken."""
    setup: Setup
    files: dict[str, list[Any]]
    """Path inside the folder -> [size, SHA-256]."""


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps lies once complete."""
    return root / f"step-{step:08d}"


def unfinished(root: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps is written."""
    return root / f"step-{step:08d}.tmp"


def begin(root: Path, step: int, size: int = 0) -> Path:
    """Make an empty folder to write a checkpoint of about ``size`` bytes into. Call on one rank.

    Raises:
        UserError: the disk has no room for it.
    """
    folder = unfinished(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(root).free
    if free < size:
        raise UserError(
            f"a checkpoint needs about {human_bytes(size)}, but the disk of {root} has {human_bytes(free)} left:\n"
            "make room and run again; training resumes from the last checkpoint"
        )
    return folder


def write_shard(folder: Path, rank: int, slices: dict[str, Tensor]) -> None:
    """Write one rank's shard into ``folder`` (from `begin`) and force it to disk."""
    path = folder / f"rank-{rank:05d}.safetensors"
    save_file(slices, path)
    with atomic_path(path.with_suffix(".json")) as described:
        described.write_text(json.dumps(describe(path), allow_nan=False), encoding="utf-8")


def await_shards(folder: Path, ranks: int, seconds: float) -> None:
    """Wait until all ranks have written their shards into ``folder``.

    Raises:
        TimeoutError: one had not after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while (written := len(list(folder.glob("rank-*.json")))) < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{folder} has the shards of {written} of {ranks} ranks after {seconds:.0f} seconds: "
                "is it a folder that all machines share?"
            )
        time.sleep(0.02)


def commit(folder: Path, *, step: int, setup: Setup, history: Any) -> int:
    """Seal the shards that all ranks wrote into ``folder``, rename it, and return its size in bytes.

    Call on one rank, when all have written.
    """
    (folder / HISTORY).write_text(json.dumps(history, allow_nan=False), encoding="utf-8")
    files = {HISTORY: describe(folder / HISTORY)}
    for described in sorted(folder.glob("rank-*.json")):
        files[f"{described.stem}.safetensors"] = json.loads(described.read_text(encoding="utf-8"))
        described.unlink()
    record = {"format": FORMAT, **asdict(Checkpoint(step, setup, files))}
    (folder / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
    fsync(folder / RECORD)
    fsync(folder)
    shutil.rmtree(folder_of(folder.parent, step), ignore_errors=True)  # a rollback saves a step again
    folder.rename(folder_of(folder.parent, step))
    fsync(folder.parent)
    return sum(size for size, _ in files.values())


def complete(root: Path) -> list[Checkpoint]:
    """List the checkpoints under ``root`` that have their record, newest first. Checksums are not read."""
    return [record for folder in committed(root) if (record := read_record(folder))]


def committed(root: Path) -> list[Path]:
    """List the folders under ``root`` that have a checkpoint's final name, newest first."""
    folders = [folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", folder.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step that a complete checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def read_record(folder: Path) -> Checkpoint | None:
    """Return the record in ``folder``, or None where it is missing, torn or of another format."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            return None
        return Checkpoint(record["step"], Setup(**record["setup"]), record["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def damage(root: Path, checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint's files, or None when all have their size and checksum."""
    folder = folder_of(root, checkpoint.step)
    for name, (size, digest) in checkpoint.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def recover(root: Path, until: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint that passes its checksums, of at most ``until`` steps, and what newer ones lack.

    Those are removed, and so are later ones: they are of no use, and `prune` would count them among the newest.
    """
    problems: list[str] = []
    for folder in committed(root):
        if until is not None and step_of(folder) > until:
            shutil.rmtree(folder)
            continue
        checkpoint = read_record(folder)
        problem = (
            damage(root, checkpoint) if checkpoint else f"{RECORD} is missing, torn or of another version"
        )
        if problem is None:
            return checkpoint, problems
        problems.append(f"removed {folder.name}: {problem}")
        shutil.rmtree(folder)
    return None, problems


def require_same_training(checkpoint: Checkpoint, setup: Setup) -> None:
    """Refuse to resume in another precision than a checkpoint was made in, which would be another training, or with
    layers split otherwise, for shards of matrices are saved as they are.

    Raises:
        UserError: these differ.
    """
    if checkpoint.setup.tensor_parallel != setup.tensor_parallel:
        raise UserError(
            f"the checkpoint of step {checkpoint.step} was made with tensor_parallel="
            f"{checkpoint.setup.tensor_parallel}, but pretrain would resume with {setup.tensor_parallel}:\nset "
            f"pretrain.runtime.tensor_parallel to {checkpoint.setup.tensor_parallel} again, or force pretrain to start "
            "again"
        )
    if checkpoint.setup.precision != setup.precision:
        raise UserError(
            f"the checkpoint of step {checkpoint.step} was made in {checkpoint.setup.precision}, but pretrain would "
            f"resume in {setup.precision}:\nset pretrain.precision to {checkpoint.setup.precision} again, or force "
            "pretrain to start again"
        )


def changes(checkpoint: Checkpoint, setup: Setup) -> str | None:
    """Return how ``setup`` differs from what a checkpoint was made with; None where the bits will be the same."""
    made, now = asdict(checkpoint.setup), asdict(setup)
    changed = [name for name in made if made[name] != now[name]]
    if not changed:
        return None
    was, is_now = (", ".join(f"{name}={values[name]}" for name in changed) for values in (made, now))
    return (
        f"the checkpoint of step {checkpoint.step} was made with {was}, and training resumes with {is_now}: "
        "it reads the same batches, but sums in another order, so the last bits may differ from here on"
    )


def read_history(root: Path, checkpoint: Checkpoint) -> Any:
    """Read what `commit` was given as ``history``."""
    return json.loads((folder_of(root, checkpoint.step) / HISTORY).read_text(encoding="utf-8"))


def prune(
    root: Path, keep: int, *, every: int | None = None, spare: int | None = None, steps: Collection[int] = ()
) -> None:
    """Remove what never completed, and of what did all but the newest ``keep``, those of each ``every`` steps, the
    newest that is a multiple of ``spare``, and those of ``steps``."""
    for folder in root.glob("step-*.tmp"):
        shutil.rmtree(folder)
    found = [checkpoint.step for checkpoint in complete(root)]
    kept = {step for step in found if every and step % every == 0} | set(found[:keep]) | set(steps)
    kept |= set([step for step in found if spare and step % spare == 0][:1])
    for step in set(found) - kept:
        shutil.rmtree(folder_of(root, step))


def copy(source: Path, target: Path) -> None:
    """Have the complete checkpoint in a folder in another one too, which appears whole; what is there is replaced.

    No byte is copied where both are of one file system.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in source.iterdir():
        try:
            os.link(path, temporary / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, temporary / path.name)
            fsync(temporary / path.name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    fsync(target.parent)


def describe(path: Path) -> list[Any]:
    """Return [size, SHA-256] of a file, after forcing it to disk."""
    fsync(path)
    return [path.stat().st_size, file_sha256(path)]
