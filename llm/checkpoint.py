"""Checkpoints in two phases: every rank writes into ``step-00000050.tmp``, all is synced to disk and rank 0 records
each file's size and SHA-256, and only then is the folder renamed. So a folder with its final name is whole unless
the disk failed, and that the checksums tell before anything is loaded. The newest whole one is what a start
continues from; a torn one is passed over. There is no ``latest`` file that could be wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.context import UserError, human_bytes

RECORD = "checkpoint.json"
HISTORY = "history.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a complete checkpoint says of itself."""

    step: int
    """Optimizer steps taken."""
    ranks: int
    zero_stage: int
    files: dict[str, list[Any]]
    """Path inside the folder -> [size, SHA-256]."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies once complete."""
    return root / f"step-{step:08d}"


def unfinished(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is written."""
    return root / f"step-{step:08d}.tmp"


def begin(root: Path, step: int, size: int = 0) -> Path:
    """An empty folder to write a checkpoint of ``size`` bytes, about, into. Call on one rank.

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
            "make room and run again; training goes on from the last checkpoint"
        )
    return folder


def commit(folder: Path, *, step: int, ranks: int, zero_stage: int, history: Any) -> int:
    """Seal what all ranks wrote into ``folder`` (from `begin`), rename it, and return its size in bytes.

    Call on one rank, when all have written.
    """
    (folder / HISTORY).write_text(json.dumps(history))
    files = {str(path.relative_to(folder)): describe(path) for path in walk(folder)}
    record = Checkpoint(step, ranks, zero_stage, files)
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1))
    sync(folder / RECORD)
    sync(folder)
    target = folder_of(folder.parent, step)
    shutil.rmtree(target, ignore_errors=True)  # a torn one that a resume passed over
    folder.rename(target)
    sync(folder.parent)
    return sum(size for size, _ in files.values())


def complete(root: Path) -> list[Checkpoint]:
    """The checkpoints under ``root`` that have their record, newest first. Checksums are not read."""
    names = (folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", folder.name))
    found = [record for folder in names if (record := read_record(folder))]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def read_record(folder: Path) -> Checkpoint | None:
    """The record in ``folder``, or None where it is missing or torn."""
    try:
        return Checkpoint(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def damage(root: Path, checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, or None when all have their size and checksum."""
    folder = folder_of(root, checkpoint.step)
    for name, (size, digest) in checkpoint.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that passes its checksums, and what was passed over and why."""
    passed_over: list[str] = []
    for checkpoint in complete(root):
        problem = damage(root, checkpoint)
        if problem is None:
            return checkpoint, passed_over
        passed_over.append(f"checkpoint of step {checkpoint.step}: {problem}")
    return None, passed_over


def require_same_shape(checkpoint: Checkpoint, *, ranks: int, zero_stage: int) -> None:
    """Refuse to go on with other ranks or another ZeRO stage than a checkpoint was made with.

    Raises:
        UserError: they differ.
    """
    if (checkpoint.ranks, checkpoint.zero_stage) != (ranks, zero_stage):
        raise UserError(
            f"the checkpoint of step {checkpoint.step} was made with {checkpoint.ranks} rank(s) at ZeRO stage "
            f"{checkpoint.zero_stage}, but pretrain.runtime asks for {ranks} at stage {zero_stage}:\n"
            f"set runtime.ranks={checkpoint.ranks} and runtime.zero_stage={checkpoint.zero_stage} to go on, "
            "or force pretrain to start again"
        )


def read_history(root: Path, checkpoint: Checkpoint) -> Any:
    """What `commit` was given as ``history``."""
    return json.loads((folder_of(root, checkpoint.step) / HISTORY).read_text())


def prune(root: Path, keep: int) -> None:
    """Remove what never completed, and all but the newest ``keep`` that did."""
    for folder in root.glob("step-*.tmp"):
        shutil.rmtree(folder)
    for checkpoint in complete(root)[keep:]:
        shutil.rmtree(folder_of(root, checkpoint.step))


def walk(folder: Path) -> list[Path]:
    """All files under ``folder``, in order of name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe(path: Path) -> list[Any]:
    """[size, SHA-256] of a file, after forcing it to disk."""
    sync(path)
    return [path.stat().st_size, sha256(path)]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
