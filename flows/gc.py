"""Things that can be removed from a home: what no run of the last days refers to, or an artifact that must go with all
that was made from it. It is listed first, with reasons.

Kept is what a run of these days made, reused or holds; what a registered model was exported from; what is being built;
and whatever those were made from. An artifact is removed under its locks, after all that was made from it, and by
another name first, so that nothing half removed is ever taken for whole; a kill leaves a folder that the next call
removes. Without an answer from MLflow nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal
from uuid import uuid4

from filelock import Timeout

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import fsync
from flows.engine.log import logs
from flows.engine.store import LINKED, REPLACED, Store, shared_lock
from flows.engine.uses import alone, last_used, use_path
from flows.lineage.graph import Graph, Key, Node
from flows.listeners.mlflow.copies import Copies
from flows.listeners.mlflow.delivery import unsent
from flows.listeners.mlflow.lineage import ModelVersion, NotAsked
from flows.listeners.mlflow.links import without_user

DAY = 86_400
REMOVED = ".removed"
COMPACT_SECONDS = 60  # for the servers to let a database go
RUN_IDS = 20  # of the newest artifacts, by which MLflow is recognised as the one to which they were reported


@dataclass(frozen=True)
class Candidate:
    """Something that can be removed."""

    kind: Literal["artifact", "unfinished", "copies", "left over", "state", "lock", "database"]
    path: Path
    why: str
    size: int = 0
    key: Key | None = None
    used: int = 0
    """When a run last used it, as it was when this was found."""
    copies: tuple[str, ...] = ()
    """MLflow's copies of it, which go first."""


@dataclass
class Survey:
    """Things that can be removed, each after what was made from it, and those that are kept, with the reason."""

    candidates: list[Candidate] = field(default_factory=list)
    kept: dict[Key, str] = field(default_factory=dict)
    refusal: str = ""
    """Why nothing may be removed; empty where it may."""
    copies: Copies | None = None
    """MLflow's copies; None where nothing was ever reported to it."""

    @property
    def size(self) -> int:
        return sum(one.size for one in self.candidates)


@dataclass(frozen=True)
class Answers:
    """The answers of MLflow."""

    used: frozenset[Key] = frozenset()
    versions: tuple[ModelVersion, ...] = ()
    refusal: str = ""
    copies: Copies | None = None


def ask_mlflow(graph: Graph, since: float) -> Answers:
    """Ask which artifacts runs since then refer to and which models are registered; or why it can't be known."""
    manifests = [node.artifact.manifest for node in graph.nodes.values() if node.artifact]
    named = [(one.get("mlflow_run_id", ""), one.get("mlflow_key", "")) for one in manifests]
    reported = [one for one in named if any(one)]
    try:
        records = Copies(graph.store.home)
        used, versions = records.used_since(int(since * 1000)), records.versions()
        if reported and not records.knows_one_of(reported[-RUN_IDS:]):
            raise NotAsked(
                f"MLflow at {without_user(records.uri)} knows none of the runs that made what is sealed here: set "
                "MLFLOW_TRACKING_URI to the one that they were reported to (or send what is left: llmill sync)"
            )
    except NotAsked as error:
        if not reported and not os.environ.get("MLFLOW_TRACKING_URI"):
            return Answers()  # no run ever reported anything to it
        return Answers(refusal=str(error))
    return Answers(frozenset(used), tuple(versions), copies=records)


def survey(store: Store, days: float, now: float | None = None) -> Survey:
    """Find what no run of the last ``days`` refers to."""
    now = now or time.time()
    since = now - days * DAY
    in_use = InUse.of(store)
    graph = Graph(store)
    answers = ask_mlflow(graph, since)
    found = Survey(refusal=answers.refusal, copies=answers.copies)
    for node in graph.nodes.values():
        if node.state != "missing" and (why := kept_because(graph, node, answers, in_use, since)):
            found.kept[node.key] = why
    for node in graph.ancestors(found.kept):
        found.kept.setdefault(node.key, "what is kept was made from it")
    nodes = [node for node in graph.nodes.values() if node.state != "missing" and node.key not in found.kept]
    ordered = reversed(graph.in_order(node.key for node in nodes))
    found.candidates = [candidate(node, in_use, "no run refers to it", found.copies) for node in ordered]
    found.candidates += left_over(store, graph, since)
    found.candidates += old_state(store, found.kept, since)
    found.candidates += stale_locks(store, since)
    return found


@dataclass(frozen=True)
class InUse:
    """Who used what when it was looked at.

    It is looked at before the store is read. So a run that was at work then has what it uses in `now`, one that had
    ended has all that it made in the store, and one that began later changed a time in `last`.
    """

    last: Mapping[Key, int]
    now: frozenset[Key]

    @classmethod
    def of(cls, store: Store) -> InUse:
        keys = [(path.parent.name, path.name[1:-4]) for path in store.root.glob("[!.]*/.*.use")]
        last = {key: last_used(store, *key) for key in keys}
        return cls(last, frozenset(key for key in keys if held(store, key)))


def kept_because(graph: Graph, node: Node, answers: Answers, in_use: InUse, since: float) -> str | None:
    """Why an artifact is kept for its own sake; None where it is not."""
    store = graph.store
    if node.stage == "export":
        models = [str(one) for one in answers.versions if one.needed and one.fingerprint == node.fingerprint]
        if models:
            return ", ".join(models)
    if node.key in in_use.now or held(store, node.key):
        return "a run is using it"
    if node.key in answers.used:
        return "a run in MLflow refers to it"
    made = made_at(node)
    if made >= since:
        return f"it is of {day(made)}"
    last = in_use.last.get(node.key, 0) / 1e9
    return f"a run used it on {day(last)}" if last >= since else None


def held(store: Store, key: Key) -> bool:
    """Whether a run uses or builds an artifact now."""
    if use_path(store, *key).exists():
        with alone(store, *key) as free:
            if not free:
                return True
    return not is_free(Path(store.lock(*key).lock_file))


def claim(store: Store, key: Key, stack: ExitStack) -> bool:
    """Take both locks of an artifact for as long as ``stack`` lasts, if they are free."""
    if not stack.enter_context(alone(store, *key)):
        return False
    try:
        stack.enter_context(store.lock(*key).acquire(timeout=0))
    except Timeout:
        return False
    return True


def made_at(node: Node) -> float:
    """When an artifact was sealed, or last written to."""
    if node.artifact:
        return datetime.fromisoformat(node.artifact.manifest["finished"]).timestamp()
    return newest_time(node.path)


def all_in(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A folder and all that is in it, less what a run at work removes meanwhile."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent), *(Path(parent, name) for name in names)):
            with suppress(FileNotFoundError):
                yield path, path.stat()


def newest_time(folder: Path) -> float:
    """When a folder, or anything in it, was last written; now, where a run has just sealed it."""
    return max((found.st_mtime for _, found in all_in(folder)), default=time.time())


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(found.st_size for path, found in all_in(folder) if path.is_file())


def day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d}"


def candidate(node: Node, in_use: InUse, why: str, copies: Copies | None) -> Candidate:
    """An artifact, sealed or not, as something to be removed, with its copies."""
    held = tuple(copy.name for copy in copies.of(node.key)) if copies else ()
    if held:
        why += f"; {len(held)} copies in MLflow"
    if node.state == "missing":
        last = in_use.last.get(node.key, 0)
        return Candidate(
            kind="copies",
            path=node.path,
            why=f"not here any more; {why}",
            key=node.key,
            used=last,
            copies=held,
        )
    verb = "sealed" if node.artifact else "left unfinished"
    when, last = f"{verb} {day(made_at(node))}", in_use.last.get(node.key, 0)
    description = f"{when}, last used {day(last / 1e9)}; {why}" if last else f"{when}; {why}"
    kind: Literal["artifact", "unfinished"] = "artifact" if node.artifact else "unfinished"
    return Candidate(
        kind=kind,
        path=node.path,
        why=description,
        size=size_of(node.path),
        key=node.key,
        used=last,
        copies=held,
    )


def left_over(store: Store, graph: Graph, since: float) -> Iterator[Candidate]:
    """Folders that were being removed or replaced when a kill came, and builds that nobody resumed."""
    for path in sorted(store.root.glob(f"[!.]*/*{REMOVED}")):
        yield left_at(path, "an earlier gc did not come to its end")
    for path in sorted(store.root.glob(f"{LINKED}*")):
        if newest_time(path) < min(since, time.time() - DAY):  # else it may be on its way
            yield left_at(path, "a run was killed while it sent this to MLflow")
    for path in sorted(store.root.glob(f"[!.]*/*{REPLACED}")):
        key = (path.parent.name, path.stem)
        given_up = store.path(*key).exists() or newest_time(path) < since  # else the next run puts it back
        if given_up and not held(store, key):
            yield left_at(path, "was built again", key, last_used(store, *key))
    for path in sorted(store.root.glob("[!.]*/*.partial")):
        key = (path.parent.name, path.stem)
        again = key in graph.nodes and graph.nodes[key].path != path
        if again and newest_time(path) < since and not held(store, key):
            yield left_at(path, "its build again was given up", key, last_used(store, *key))


def left_at(path: Path, why: str, key: Key | None = None, used: int = 0) -> Candidate:
    """A folder that nobody resumes, as something to be removed."""
    return Candidate(kind="left over", path=path, why=why, size=size_of(path), key=key, used=used)


def old_state(store: Store, kept: Mapping[Key, str], since: float) -> Iterator[Candidate]:
    """Where the tracking of runs stands that nobody resumed."""
    for path in sorted((store.home / "runs").glob("*.json")):
        name, _, fingerprint = path.stem.rpartition("-")
        if path.stat().st_mtime < since and (name, fingerprint) not in kept and is_free(state_lock(path)):
            yield Candidate(kind="state", path=path, why="nobody resumed that run", size=path.stat().st_size)


def state_lock(path: Path) -> Path:
    """The lock of a run's state, as the tracker names it."""
    return path.with_name(f".{path.stem}.lock")


def stale_locks(store: Store, since: float) -> Iterator[Candidate]:
    """Orphaned lock files."""
    found: dict[Key, float] = {}
    for path in sorted([*store.root.glob("[!.]*/.*.lock"), *store.root.glob("[!.]*/.*.use")]):
        key = (path.parent.name, path.name[1:].rpartition(".")[0])
        found[key] = max(path.stat().st_mtime, found.get(key, 0))
    for key, touched in found.items():
        there = store.path(*key).exists() or store.partial(*key).exists()
        if not there and touched < since and not held(store, key):
            yield Candidate("lock", use_path(store, *key), "orphaned", key=key)
    for path in sorted((store.home / "runs").glob(".*.lock")):
        state = path.with_name(f"{path.name[1:].removesuffix('.lock')}.json")
        if not state.exists() and path.stat().st_mtime < since and is_free(path):
            yield Candidate("lock", path, "of a run that is over")


def is_free(lock: Path) -> bool:
    """Whether nobody holds a lock; one that was never made is free."""
    if not lock.exists():
        return True
    try:
        with shared_lock(lock).acquire(timeout=0):
            return True
    except Timeout:
        return False


def select(store: Store, fingerprints: Iterable[str], models: bool = False) -> Survey:
    """Some artifacts and all that was made from them, however young, also where only MLflow still has a copy.

    With ``models``, registered versions that somebody relies on go too.

    Raises:
        UserError: there is no such artifact; a registered model or a run needs one of them.
    """
    in_use = InUse.of(store)
    graph = Graph(store)
    answers = ask_mlflow(graph, time.time())
    chosen = [chosen_key(graph, answers.copies, text) for text in fingerprints]
    going = with_descendants(graph, answers.copies, chosen)
    for version in answers.versions:
        if version.needed and not models and ("export", version.fingerprint) in going:
            raise UserError(
                f"{version} was exported from what would go: give its aliases to another version, or have gc delete "
                "it too, with --models; see docs/takedown.md"
            )
    if busy := [f"{key[0]} {key[1]}" for key in sorted(going) if key in in_use.now or held(store, key)]:
        raise UserError(f"a run is using {', '.join(busy)}: stop it, or wait for its end")
    found = Survey(refusal=answers.refusal or waiting(store.home), copies=answers.copies)
    for node in reversed(graph.in_order(going)):
        why = "asked for" if node.key in chosen else "made from what goes"
        one = candidate(node, in_use, why, answers.copies)
        if node.state == "missing" and not one.copies:
            continue
        found.candidates.append(one)
        again = store.partial(*node.key)
        if node.artifact and again.exists():
            last = in_use.last.get(node.key, 0)
            build = left_at(again, "its build again", node.key, last)
            found.candidates.append(build)
    return found


def chosen_key(graph: Graph, copies: Copies | None, text: str) -> Key:
    """The artifact that a person names; it may be one of which only MLflow has a copy.

    Raises:
        UserError: there is none, or there are several.
    """
    node = graph.named(text)
    if node and node.state != "missing":
        return node.key
    copied = copies.named(text) if copies else []
    if len(copied) == 1:
        return copied[0]
    close = graph.alike(text) or [key[1] for key in copied]
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"--artifact {text}: there is none in {graph.store.root}, nor in MLflow{meant}")


def with_descendants(graph: Graph, copies: Copies | None, keys: Iterable[Key]) -> set[Key]:
    """Artifacts and all that was made from them, as the store or runs in MLflow have it."""
    going = set(keys)
    while True:
        more = {node.key for node in graph.descendants(going & graph.nodes.keys())}
        more |= copies.descendants(going) if copies else set()
        if more <= going:
            break
        going |= more
    for key in going - graph.nodes.keys():
        graph.nodes[key] = Node(key, graph.store.path(*key), None)
    return going


def waiting(home: Path) -> str:
    """Why copies could still come: what runs have to report to MLflow; empty where nothing waits."""
    if any(unsent(log, Store(home)) for log in logs(home)):
        return "runs have reports that MLflow does not have yet: wait for their end, or send them with llmill sync"
    return ""


def remove(store: Store, found: Survey) -> Iterator[tuple[Candidate, str]]:
    """Remove what was found; each, and why it was left after all (empty where it is gone)."""
    assert not found.refusal, found.refusal
    graph = Graph(store)
    needed: set[Key] = set()
    for one in found.candidates:
        if one.key and one.key in needed:
            yield one, "what was made from it stays"
            continue
        left = remove_one(store, one, found.copies)
        if left and one.key and one.key in graph.nodes:
            needed |= {node.key for node in graph.ancestors([one.key])}
        yield one, left
    for database in (store.home / "mlflow.db", store.home / "prefect" / "prefect.db"):
        if database.exists() and (left := compact(database)):
            yield Candidate("database", database, "what was deleted in it"), left


def compact(database: Path) -> str:
    """Have a database forget what was deleted in it, which stays in its file until then; why it did not."""
    try:
        with closing(sqlite3.connect(database, timeout=COMPACT_SECONDS, isolation_level=None)) as opened:
            opened.execute("VACUUM")
            opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        return f"what was deleted in it is still in its file: {error}"
    return ""


def remove_one(store: Store, one: Candidate, copies: Copies | None = None) -> str:
    """Remove one thing under its locks; why it was left, if it was."""
    if one.kind == "state":
        return remove_file(one.path, state_lock(one.path))
    if one.kind == "lock" and one.key is None:
        return remove_file(one.path, one.path)
    if one.key is None:
        shutil.rmtree(one.path, ignore_errors=True)  # another gc may be at it as well
        return ""
    with ExitStack() as stack:
        if not claim(store, one.key, stack):
            return "a run is using it"
        if one.kind != "lock" and last_used(store, *one.key) != one.used:
            return "a run used it meanwhile"
        if one.copies and copies:
            try:
                copies.take_away(one.key)
            except NotAsked as error:
                return f"its copies are left: {error}"
        gone = one.path.with_name(f"{one.path.name}.{uuid4().hex[:8]}{REMOVED}")
        if one.kind != "lock" and one.path.exists():
            os.rename(one.path, gone)
            fsync(gone.parent)
        if not (store.path(*one.key).exists() or store.partial(*one.key).exists()):
            for lock in (use_path(store, *one.key), Path(store.lock(*one.key).lock_file)):
                lock.unlink(missing_ok=True)  # who waits for one sees that it is gone, and makes another
    shutil.rmtree(gone, ignore_errors=True)
    return ""


def remove_file(path: Path, lock: Path) -> str:
    """Remove a file, and the lock that guards it, while we hold that."""
    if not lock.exists():
        path.unlink(missing_ok=True)
        return ""
    try:
        with shared_lock(lock).acquire(timeout=0):
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    except Timeout:
        return "a run is using it"
    return ""
