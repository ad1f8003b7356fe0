"""Checkpoints in two phases: every rank writes into ``step-00000050.tmp``, all is synced to disk and rank 0 records
each file's size and SHA-256, and only then is the folder renamed. So a folder with its final name is whole unless
the disk failed, and that the checksums tell before anything is loaded. The newest whole one is what a start
continues from; a torn one is removed. There is no ``latest`` file that could be wrong.
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
class Setup:
    """What decides the order of sums, and so the last bits of all that follows: a resume must keep it."""

    ranks: int
    zero_stage: int
    micro_batch: int
    precision: str
    device: str
    """"cpu" or "cuda"."""
    attention: str = "sdpa"


@dataclass(frozen=True)
class Checkpoint:
    """What a complete checkpoint says of itself."""

    step: int
    """Optimizer steps taken."""
    setup: Setup
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


def commit(folder: Path, *, step: int, setup: Setup, history: Any) -> int:
    """Seal what all ranks wrote into ``folder`` (from `begin`), rename it, and return its size in bytes.

    Call on one rank, when all have written.
    """
    (folder / HISTORY).write_text(json.dumps(history), encoding="utf-8")
    files = {str(path.relative_to(folder)): describe(path) for path in walk(folder)}
    record = Checkpoint(step, setup, files)
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    sync(folder / RECORD)
    sync(folder)
    folder.rename(folder_of(folder.parent, step))
    sync(folder.parent)
    return sum(size for size, _ in files.values())


def complete(root: Path) -> list[Checkpoint]:
    """The checkpoints under ``root`` that have their record, newest first. Checksums are not read."""
    return [record for folder in committed(root) if (record := read_record(folder))]


def committed(root: Path) -> list[Path]:
    """The folders under ``root`` that have a checkpoint's final name, newest first."""
    folders = [folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def read_record(folder: Path) -> Checkpoint | None:
    """The record in ``folder``, or None where it is missing or torn."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Checkpoint(record["step"], Setup(**record["setup"]), record["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
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


def recover(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that passes its checksums, and what was wrong with newer ones.

    Those are removed: they are of no use, and `prune` would count them among the newest.
    """
    problems: list[str] = []
    for folder in committed(root):
        checkpoint = read_record(folder)
        problem = damage(root, checkpoint) if checkpoint else f"{RECORD} is missing or torn"
        if problem is None:
            return checkpoint, problems
        problems.append(f"removed {folder.name}: {problem}")
        shutil.rmtree(folder)
    return None, problems


def require_same_setup(checkpoint: Checkpoint, setup: Setup) -> None:
    """Refuse to go on otherwise than a checkpoint was made: the bytes of the result would depend on the accident.

    Raises:
        UserError: the setups differ.
    """
    made, now = asdict(checkpoint.setup), asdict(setup)
    changed = [name for name in made if made[name] != now[name]]
    if changed:
        was, is_now = (", ".join(f"{name}={values[name]}" for name in changed) for values in (made, now))
        raise UserError(
            f"the checkpoint of step {checkpoint.step} was made with {was}, but pretrain would go on with {is_now}:\n"
            f"run it with {was} again (pretrain.runtime), or force pretrain to start again"
        )


def read_history(root: Path, checkpoint: Checkpoint) -> Any:
    """What `commit` was given as ``history``."""
    return json.loads((folder_of(root, checkpoint.step) / HISTORY).read_text(encoding="utf-8"))


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
