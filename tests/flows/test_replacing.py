"""What is sealed is replaced under nobody who reads it, a kill loses neither old nor new, and people share a home."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.errors import UserError
from flows.engine.store import Artifact, Store
from flows.engine.uses import Uses, recover
from flows.gc import remove, survey

NAME = ("clean", "f00d")
OLD, NEW = {"a.txt": "old", "deep/b.txt": "old"}, {"a.txt": "new", "deep/b.txt": "new"}
FORK = multiprocessing.get_context("fork")


def build(
    store: Store, files: dict[str, str], uses: Uses | None = None, wait: Callable[[], None] = print
) -> Artifact:
    with store.lock(*NAME):
        out, _ = store.begin(*NAME, {"files": files})
        for path, text in files.items():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_text(text)
        (out / "scratch").mkdir(exist_ok=True)
        (out / "scratch" / "part").write_text("part")
        finished = f"2026-01-0{1 + len(files['a.txt']) % 2}T00:00:00.000+00:00"
        manifest = {"version": 1, "config": {}, "inputs": {}, "metrics": {}, "finished": finished}
        if uses is None:
            return store.seal(*NAME, manifest)
        return store.seal(*NAME, manifest, replacing=lambda: uses.alone(*NAME, wait))


def contents(folder: Path) -> dict[str, str]:
    return {path: (folder / path).read_text() for path in OLD}


def in_child(body: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    child = FORK.Process(target=body)
    child.start()
    return child


@contextmanager
def dying_at(call: int) -> Iterator[None]:
    """Within the block, ``kill -9`` comes before the n-th call that changes a folder or makes something durable."""
    left = call

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "fsync", "chmod"):
            patch.setattr(os, name, dying(getattr(os, name)))
        yield


@pytest.mark.parametrize("replaced", [True, False])
def test_a_kill_at_any_step_of_sealing_leaves_the_old_one_or_the_new_one_whole(
    tmp_path: Path, replaced: bool
) -> None:
    states: list[str] = []
    for call in range(200):
        store = Store(tmp_path / str(call))
        if replaced:
            build(store, OLD)

        def sealed_then_killed(store: Store = store, call: int = call) -> None:
            with dying_at(call):
                build(store, NEW)

        child = in_child(sealed_then_killed)
        child.join()
        recover(store)
        found = store.get(*NAME)
        assert found or not replaced, f"killed at call {call}: the old one is lost"
        if found:
            assert store.verify(found) == []
            assert contents(found.path) in (OLD, NEW)
        states.append("new" if found and contents(found.path) == NEW else "old")
        build(store, NEW)
        left = [path.name for path in (store.root / "clean").iterdir() if not path.name.startswith(".")]
        assert left == ["f00d"]
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert states == sorted(states, reverse=True), "once it is whole it stays"
    assert states.count("new") > 3, "kills after the manifest was written lose nothing"
    assert len(states) > 12


def test_an_artifact_that_a_process_reads_is_replaced_when_that_has_ended(tmp_path: Path) -> None:
    store, waited = Store(tmp_path), FORK.Event()
    build(store, OLD)
    holds, over = FORK.Event(), FORK.Event()
    seen = FORK.Queue()

    def read() -> None:
        uses = Uses(store)
        uses.take(*NAME)
        holds.set()
        first = (store.path(*NAME) / "a.txt").read_text()
        assert waited.wait(60), "it was replaced while we read"
        seen.put({"a.txt": first, "deep/b.txt": (store.path(*NAME) / "deep" / "b.txt").read_text()})
        over.set()
        uses.release()

    reader = in_child(read)
    assert holds.wait(60)
    uses = Uses(store)
    uses.take(*NAME)
    assert uses.others(*NAME)
    build(store, NEW, uses, waited.set)
    assert over.is_set()
    assert seen.get(timeout=60) == OLD
    reader.join()
    found = store.get(*NAME)
    assert found
    assert contents(found.path) == NEW
    assert not uses.others(*NAME)


def test_two_that_build_the_same_again_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    """Both use it; the one that waits for the other's lock lets it be replaced."""
    store = Store(tmp_path)
    build(store, OLD)
    first_waits, second_uses = FORK.Event(), FORK.Event()

    def second() -> None:
        uses = Uses(store)
        uses.take(*NAME)
        second_uses.set()
        assert first_waits.wait(60)
        with uses.apart(*NAME), store.lock(*NAME):
            pass
        assert store.get(*NAME)

    other = in_child(second)
    assert second_uses.wait(60)
    uses = Uses(store)
    uses.take(*NAME)
    build(store, NEW, uses, first_waits.set)
    other.join(60)
    assert other.exitcode == 0


def test_what_a_kill_left_of_a_replaced_artifact_is_put_back_or_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    final = build(store, OLD).path
    replaced = final.with_name("f00d.replaced")
    final.rename(replaced)  # as a build of an earlier version was killed
    assert store.get(*NAME) is None
    recover(store)
    assert contents(final) == OLD
    replaced.mkdir()
    (replaced / "a.txt").write_text("old")
    listed = [one for one in survey(store, 30_000).candidates if one.path == replaced]
    assert [one.kind for one in listed] == ["left over"]
    reader = Uses(store)
    reader.take(*NAME)
    assert not [one for one in survey(store, 30_000).candidates if one.path == replaced]
    reader.release()
    assert [left for _, left in remove(store, survey(store, 30_000))] == [""]
    assert not replaced.exists()
    assert contents(final) == OLD


ANNE, BERT = 50_001, 50_002


def as_user(uid: int, body: Callable[[], None]) -> int | None:
    """The exit code of ``body`` run by a user, in a group that all users are in here."""

    def become() -> None:
        os.setgroups([])
        os.setgid(50_000)
        os.setuid(uid)
        os.umask(0o002)
        body()

    child = in_child(become)
    child.join()
    return child.exitcode


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be others")
def test_two_people_with_one_home_go_on_with_each_others_stages(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(
                folder.stat().st_mode | 0o005
            )  # pytest's own folders, through which they have to pass
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, ANNE, 50_000)
    home.chmod(0o2775)
    store = Store(home)

    def begin() -> None:
        uses = Uses(store)
        uses.take(*NAME)
        with store.lock(*NAME):
            out, _ = store.begin(*NAME, {"files": NEW})
            (out / "deep").mkdir()
            (out / "deep" / "b.txt").write_text("by Anne")

    def go_on() -> None:
        uses = Uses(store)
        uses.take(*NAME)
        build(store, {"a.txt": "new"}, uses)

    def build_again() -> None:
        uses = Uses(store)
        uses.take(*NAME)
        build(store, {"a.txt": "again"}, uses)

    assert as_user(ANNE, begin) == 0
    (store.partial(*NAME) / ".origin.json").write_text('{"files":{"a.txt":"new"}}')
    assert as_user(BERT, go_on) == 0
    found = store.get(*NAME)
    assert found
    assert store.verify(found) == []
    owners = {path.name: path.stat().st_uid for path in found.path.rglob("*.txt")}
    assert owners == {"a.txt": BERT, "b.txt": ANNE}
    assert as_user(ANNE, build_again) == 0
    assert (found.path / "a.txt").read_text() == "again"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be others")
def test_who_may_not_go_on_with_anothers_stage_is_told_before_any_work(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o005)
    store = Store(tmp_path)
    store.begin(*NAME, {"files": NEW})
    for folder in (tmp_path, store.root, store.root / "clean"):
        folder.chmod(0o777)

    def go_on() -> None:
        with pytest.raises(UserError, match=r"root began this, .*chmod -R g\+w"):
            build(store, NEW)

    assert as_user(BERT, go_on) == 0
