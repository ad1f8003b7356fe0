"""The store: every stage's output, addressed by what made it, sealed once and never modified.

``<home>/store/<stage>/<fingerprint>/`` holds the payload and ``manifest.json``. The fingerprint is a hash of the
stage, its version, the identity part of its config and the fingerprints of its inputs, so it is known before
anything runs. Work happens in ``<fingerprint>.partial/`` under a file lock; the manifest is written last and the
folder renamed, so whatever carries a fingerprint as its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256, fsync, write_durably

MANIFEST_SCHEMA = 1
MANIFEST_FIELDS = {
    "stage": str,
    "fingerprint": str,
    "config": dict,
    "inputs": dict,
    "metrics": dict,
    "finished": str,
    "files": list,
    "payload_sha256": str,
}
"""Fields that are read of every manifest."""
MADE_BEFORE = {
    "train_tokenizer": "tokenizer",
    "tokenize": "tokens",
    "pretrain": "model",
    "evaluate": "scores",
}
"""Stage -> the type that it makes, for inputs that an older manifest names by their stage; the others' stay so."""
Spread = Callable[[Callable[[Path], dict[str, Any]], list[Path]], list[dict[str, Any]]]
"""Applies a function to paths, in order, by whatever workers there are."""
SPREAD_BYTES = 10 * 10**9  # above this, one machine's disk and cores hold up a cluster
FINGERPRINT_DIGITS = 16  # 64 bits: two of a million artifacts collide with probability 3e-8
LOGS = "logs"  # what depends on the clock or the host; sealed too, but no part of the payload's checksum
ORIGIN = ".origin.json"  # from which inputs an artifact was begun; no part of the payload
ATTEMPTS = f"{LOGS}/attempts.json"  # when work on an artifact began, and how long earlier attempts worked
SCRATCH = "scratch"  # what a step needs to be resumed; dropped when all else is on disk
DROPPED = ".scratch.dropped"  # while it is removed: half of it would mislead a step that starts again
REPLACED = ".replaced"  # what the folder of an artifact is called while another takes its place
LINKED = ".linked-"  # how folders of second names begin, which are there while something is sent


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal strings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(stage: str, version: int, identity: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The name of an artifact: sha256 of what determines it, shortened to 16 hex digits.

    Args:
        identity: the JSON value of everything in the stage's config that may change its output.
        inputs: type of each input -> its fingerprint.
    """
    value = {"stage": stage, "version": version, "identity": identity, "inputs": dict(inputs)}
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:FINGERPRINT_DIGITS]


@dataclass(frozen=True)
class Input:
    """An artifact that another was made from."""

    stage: str
    fingerprint: str
    payload_sha256: str

    @property
    def key(self) -> tuple[str, str]:
        return self.stage, self.fingerprint


@dataclass(frozen=True)
class Artifact:
    """A sealed artifact: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def payload_sha256(self) -> str:
        return self.manifest["payload_sha256"]

    @property
    def metrics(self) -> dict[str, float]:
        return self.manifest["metrics"]

    @property
    def sealed_at(self) -> int:
        """When it was sealed, in milliseconds since 1970: what is reported of it again is then of one time."""
        return int(datetime.fromisoformat(self.manifest["finished"]).timestamp() * 1000)

    @property
    def inputs(self) -> dict[str, Input]:
        """Inputs by type; artifacts of before there were types name the stage in its place."""
        return {
            name if "stage" in one else MADE_BEFORE.get(name, name): Input(
                one.get("stage", name), one["fingerprint"], one["payload_sha256"]
            )
            for name, one in self.manifest["inputs"].items()
        }

    @property
    def size(self) -> int:
        """Bytes of all sealed files."""
        return sum(entry["size"] for entry in self.manifest["files"])


class Store:
    """Sealed artifacts, and the folders of those in the making, under ``home/store``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "store"

    def path(self, stage: str, fingerprint: str) -> Path:
        return self.root / stage / fingerprint

    def partial(self, stage: str, fingerprint: str) -> Path:
        """Where an artifact is built; what a killed run left there is resumed."""
        return self.root / stage / f"{fingerprint}.partial"

    def get(self, stage: str, fingerprint: str) -> Artifact | None:
        """The sealed artifact of that name, or None."""
        return read_artifact(self.path(stage, fingerprint))

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """All sealed artifacts (of one stage), oldest first."""
        sealed = []
        for path in self.sealed_folders(stage):
            with suppress(Damaged):  # `llmill verify` lists those
                sealed.append(read_artifact(path))
        return sorted(filter(None, sealed), key=lambda artifact: artifact.manifest["finished"])

    def sealed_folders(self, stage: str | None = None) -> list[Path]:
        """The folders that hold a manifest and have their final name."""
        found = (path.parent for path in self.root.glob(f"{stage or '[!.]*'}/*/manifest.json"))
        return sorted(path for path in found if "." not in path.name)

    def unfinished(self) -> list[Path]:
        """Folders of artifacts that a run builds now or that a killed or failed one left."""
        return sorted(self.root.glob("[!.]*/*.partial"))

    def lock(self, stage: str, fingerprint: str) -> FileLock:
        """The lock that whoever builds this artifact holds. The system frees it when its holder dies."""
        path = self.root / stage / f".{fingerprint}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return shared_lock(path)

    def begin(self, stage: str, fingerprint: str, origin: Mapping[str, Any]) -> tuple[Path, bool]:
        """The partial folder to build in, and whether an earlier run has begun it. Call it while holding `lock`.

        ``origin`` says what the artifact is made from beyond its name (checksums of the inputs' payloads). What
        was begun from another origin is thrown away, and so are the torn files that a kill left.
        """
        partial = self.partial(stage, fingerprint)
        text = canonical_json(origin)
        begun = partial.exists()
        if begun:
            see_writable(partial)
        if begun and (not (partial / ORIGIN).exists() or (partial / ORIGIN).read_text() != text):
            shutil.rmtree(partial)
            begun = False
        partial.mkdir(parents=True, exist_ok=True)
        for torn in partial.rglob(".*.tmp"):
            torn.unlink(missing_ok=True)
        shutil.rmtree(partial / DROPPED, ignore_errors=True)
        write_durably(partial / ORIGIN, text)
        return partial, begun

    def seal(
        self,
        stage: str,
        fingerprint: str,
        manifest: Mapping[str, Any],
        spread: Spread | None = None,
        replacing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Artifact:
        """Checksum and fsync the partial folder, write its manifest last, and give it its final name.

        ``manifest`` holds what the caller knows (config, inputs, metrics, times ...); files, sizes and checksums
        are added here. ``spread`` computes the checksums where there are more than `SPREAD_BYTES`; without it, threads
        here do. An artifact that is being replaced (``--force``) gives way within ``replacing``, which keeps others
        from reading it meanwhile. From the manifest on, a kill loses neither: `finish` resumes.
        """
        partial = self.partial(stage, fingerprint)
        (partial / "manifest.json").unlink(missing_ok=True)
        files = checksum_files(partial, spread)
        if (partial / SCRATCH).exists():
            os.rename(partial / SCRATCH, partial / DROPPED)
            shutil.rmtree(partial / DROPPED)
        sealed = {
            "schema": MANIFEST_SCHEMA,
            "stage": stage,
            "fingerprint": fingerprint,
            **manifest,
            "files": files,
            "payload_sha256": payload_checksum(files),
        }
        for path in partial.rglob("*"):
            if path.is_dir():
                fsync(path)
            else:
                protect(path)
        write_durably(
            partial / "manifest.json",
            json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )
        protect(partial / "manifest.json")
        if self.path(stage, fingerprint).exists():
            with replacing():
                self.finish(stage, fingerprint)
        else:
            self.finish(stage, fingerprint)
        return Artifact(self.path(stage, fingerprint), sealed)

    def finish(self, stage: str, fingerprint: str) -> None:
        """Give a partial folder its final name, if its manifest says that it is whole; resume where a kill came.

        Call it while holding `lock` and, where an artifact of that name is there, when nobody reads it.
        """
        partial, final = self.partial(stage, fingerprint), self.path(stage, fingerprint)
        replaced = final.with_name(f"{fingerprint}{REPLACED}")
        if (partial / "manifest.json").exists():
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(final, replaced)
            os.rename(partial, final)
            fsync(final.parent)
        elif replaced.exists() and not final.exists():
            os.rename(replaced, final)
        shutil.rmtree(replaced, ignore_errors=True)

    def interrupted(self) -> list[tuple[str, str]]:
        """Stage and fingerprint of what a kill came to while it got its name, or while what it replaced was removed."""
        found = [*self.root.glob("[!.]*/*.partial/manifest.json"), *self.root.glob(f"[!.]*/*{REPLACED}")]
        folders = [path.parent if path.name == "manifest.json" else path for path in found]
        return sorted({(path.parent.name, path.name.partition(".")[0]) for path in folders})

    def verify(self, artifact: Artifact) -> list[str]:
        """Compare every file with its recorded size and checksum; one line for each that differs."""
        expected = {entry["path"]: entry for entry in artifact.manifest["files"]}
        found = {
            path.relative_to(artifact.path).as_posix()
            for path in artifact.path.rglob("*")
            if path.is_file() and path.name not in ("manifest.json", ORIGIN)
        }
        problems = [f"{path}: missing" for path in sorted(expected.keys() - found)]
        problems += [f"{path}: not in the manifest" for path in sorted(found - expected.keys())]
        present = sorted(expected.keys() & found)
        with ThreadPoolExecutor(4) as pool:
            checks = pool.map(lambda path: file_sha256(artifact.path / path), present)
            for path, sha256 in zip(present, checks, strict=True):
                if sha256 != expected[path]["sha256"]:
                    problems.append(f"{path}: its content is not what was sealed")
        if payload_checksum(artifact.manifest["files"]) != artifact.payload_sha256:
            problems.append("manifest.json: its checksums do not agree with one another")
        return problems


class Damaged(UserError):
    """A manifest that can't be read."""


def read_artifact(path: Path) -> Artifact | None:
    """The artifact sealed in ``path``, or None where there is no manifest."""
    try:
        manifest = read_manifest(path / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if (manifest["stage"], manifest["fingerprint"]) != (path.parent.name, path.name.partition(".")[0]):
        raise Damaged(f"{path / 'manifest.json'} is damaged; remove that folder and run again")
    return Artifact(path, manifest)


def read_manifest(file: Path) -> dict[str, Any]:
    """The manifest in a file.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it can't be read, or is no manifest.
    """
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        manifest = None
    except OSError as error:
        raise Damaged(f"{file} can't be read: {error.strerror}") from None
    # Only damage from outside can do this: manifests are fsynced before the folder gets its name.
    if not isinstance(manifest, dict) or not is_whole(manifest):
        raise Damaged(f"{file} is damaged; remove that folder and run again")
    return manifest


def is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest holds all that is read of it."""
    return (
        all(isinstance(manifest.get(name), kind) for name, kind in MANIFEST_FIELDS.items())
        and all(
            isinstance(one, dict) and isinstance(one.get("path"), str) and isinstance(one.get("size"), int)
            for one in manifest["files"]
        )
        and is_time(manifest["finished"])
        and all(
            isinstance(one, dict) and {"fingerprint", "payload_sha256"} <= one.keys()
            for one in manifest["inputs"].values()
        )
    )


def is_time(text: str) -> bool:
    try:
        return bool(datetime.fromisoformat(text))
    except ValueError:
        return False


def origin_of(inputs: Mapping[str, Artifact]) -> dict[str, list[str]]:
    """Return what an artifact is begun from: type of an input -> its stage, and the checksum of its payload."""
    return {type_: [one.stage, one.payload_sha256] for type_, one in inputs.items()}


def protect(path: Path) -> None:
    """Let nobody write to a file; one that another user made stays as he made it."""
    with suppress(PermissionError):
        path.chmod(0o444)


def see_writable(partial: Path) -> None:
    """See that we may resume what was begun, perhaps by another user of the home.

    Raises:
        UserError: we may not write there.
    """
    for parent, _, _ in os.walk(partial):
        if not os.access(parent, os.W_OK | os.X_OK):
            owner = Path(parent).owner()
            raise UserError(
                f"{parent}: {owner} began this, and we may not resume it: let {owner} run it, or give us leave to "
                f"write there (chmod -R g+w {shlex.quote(str(partial))}, and umask 002 for all who share a home)"
            )


def shared_lock(path: Path) -> FileLock:
    """A lock on a file, which all who may write in its folder can take, whoever made it."""
    return FileLock(path, mode=lock_mode(path))


def lock_mode(path: Path) -> int:
    """The mode of a lock's file: writable for those for whom its folder is."""
    return 0o644 | stat.S_IMODE(path.parent.stat().st_mode) & 0o022


def begin_attempt(folder: Path) -> tuple[int, float]:
    """Note that work on a partial folder begins now; how many attempts there were before, and for how many seconds.

    An attempt that was killed lasted until it last wrote something.
    """
    note, attempts, seconds = folder / ATTEMPTS, 0, 0.0
    if note.exists():
        last = json.loads(note.read_text())
        files = (path for path in folder.rglob("*") if path.is_file() and path != folder / ORIGIN)
        attempts = last["earlier"] + 1
        seconds = last["seconds"] + max(0.0, max(path.stat().st_mtime for path in files) - last["began"])
    note.parent.mkdir(exist_ok=True)
    write_durably(
        note, json.dumps({"earlier": attempts, "seconds": seconds, "began": time.time()}, allow_nan=False)
    )
    return attempts, seconds


def checksum_files(folder: Path, spread: Spread | None = None) -> list[dict[str, Any]]:
    """``[{path, size, sha256}]`` of all files below ``folder`` but scratch, sorted by path; all are on disk then."""
    scratch = folder / SCRATCH
    found = (path for path in folder.rglob("*") if path.is_file() and path != folder / ORIGIN)
    paths = sorted(path for path in found if scratch not in path.parents)
    describe = partial(describe_file, folder)
    if spread and sum(path.stat().st_size for path in paths) > SPREAD_BYTES:
        return spread(describe, paths)
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(describe, paths))


def describe_file(folder: Path, path: Path) -> dict[str, Any]:
    """A file of ``folder`` as a manifest lists it."""
    sha256 = file_sha256(path, fsync=True)
    return {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": sha256}


def payload_checksum(files: list[dict[str, Any]]) -> str:
    """sha256 over names and checksums of the payload: all files but those under ``logs/``."""
    payload = [
        [entry["path"], entry["sha256"]] for entry in files if not entry["path"].startswith(f"{LOGS}/")
    ]
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def now() -> str:
    """The time, ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
