"""The store's laws: a name is a promise, what is sealed is whole, and a killed builder leaves no lock."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from flows.engine.store import ATTEMPTS, Damaged, Store, begin_attempt, fingerprint, payload_checksum
from flows.lineage.graph import Graph
from flows.lineage.target import in_folder

ORIGIN = {"inputs": {}}
MANIFEST = {
    "version": 1,
    "config": {},
    "inputs": {},
    "metrics": {},
    "finished": "2026-01-01T00:00:00.000+00:00",
}


def build(store: Store, name: str = "f00d", files: dict[str, str] | None = None):
    with store.lock("clean", name):
        out, _ = store.begin("clean", name, ORIGIN)
        for path, text in (files or {"documents.txt": "hello"}).items():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_text(text)
        return store.seal("clean", name, MANIFEST)


def test_fingerprints_stay_what_they_were():
    # A change of these values orphans every artifact that people have sealed: bump a stage version instead.
    assert fingerprint("clean", 1, {"min_chars": 10}, {"download": "00ff"}) == "9b76c1600c233f45"
    assert fingerprint("clean", 2, {"min_chars": 10}, {"download": "00ff"}) == "75af123bf91b08f7"


@pytest.mark.parametrize(
    "other",
    [
        ("dedup", 1, {"a": 1, "b": 2}, {"x": "1"}),
        ("clean", 2, {"a": 1, "b": 2}, {"x": "1"}),
        ("clean", 1, {"a": 1, "b": 3}, {"x": "1"}),
        ("clean", 1, {"a": 1, "b": 2}, {"x": "2"}),
    ],
)
def test_every_part_of_what_made_an_artifact_is_in_its_name(other):
    assert fingerprint("clean", 1, {"b": 2, "a": 1}, {"x": "1"}) != fingerprint(*other)


def test_the_order_of_keys_does_not_matter():
    assert fingerprint("s", 1, {"a": 1, "b": 2}, {}) == fingerprint("s", 1, {"b": 2, "a": 1}, {})


def test_a_sealed_artifact_is_found_again_and_verifies(tmp_path):
    store = Store(tmp_path)
    sealed = build(store)
    found = Store(tmp_path).get("clean", "f00d")
    assert found is not None
    assert found.manifest == sealed.manifest
    assert store.verify(found) == []
    assert [artifact.path for artifact in store.artifacts()] == [sealed.path]
    assert store.unfinished() == []


def test_an_unfinished_artifact_is_no_artifact(tmp_path):
    store = Store(tmp_path)
    out, _ = store.begin("clean", "f00d", ORIGIN)
    (out / "documents.txt").write_text("half")
    assert store.get("clean", "f00d") is None
    assert store.artifacts() == []
    assert store.unfinished() == [out]


def test_torn_files_of_a_killed_run_are_removed_and_whole_ones_kept(tmp_path):
    store = Store(tmp_path)
    out, begun = store.begin("clean", "f00d", ORIGIN)
    assert not begun
    (out / "rejected").mkdir()
    (out / "rejected" / ".a.parquet.tmp").write_text("torn")
    (out / "a.parquet").write_text("whole")
    out, begun = store.begin("clean", "f00d", ORIGIN)
    assert begun
    assert [path.name for path in out.rglob("*.parquet*") if path.is_file()] == ["a.parquet"]


def test_what_was_begun_from_other_bytes_is_not_gone_on_with(tmp_path):
    store = Store(tmp_path)
    out, _ = store.begin("clean", "f00d", {"inputs": {"download": "one"}})
    (out / "a.parquet").write_text("made from one")
    out, begun = store.begin("clean", "f00d", {"inputs": {"download": "two"}})
    assert not begun
    assert not (out / "a.parquet").exists()


def test_an_attempt_lasts_until_it_last_wrote_and_the_time_between_attempts_does_not_count(tmp_path):
    folder, _ = Store(tmp_path).begin("clean", "0c", {})
    assert begin_attempt(folder) == (0, 0)
    began = (folder / ATTEMPTS).stat().st_mtime
    (folder / "part").write_text("x")
    for path in folder.rglob("*"):
        os.utime(path, (began, began))
    os.utime(folder / "part", (began + 40, began + 40))
    Store(tmp_path).begin("clean", "0c", {})
    attempts, seconds = begin_attempt(folder)
    assert (attempts, seconds) == (1, pytest.approx(40, abs=1))
    os.utime(folder / "part", (began + 1e6, began + 1e6))
    os.utime(folder / ATTEMPTS, (began, began))
    note = json.loads((folder / ATTEMPTS).read_text()) | {"began": began + 1e6 - 2}
    (folder / ATTEMPTS).write_text(json.dumps(note))
    assert begin_attempt(folder) == (2, pytest.approx(42, abs=1))


def test_scratch_is_dropped_when_all_else_is_sealed(tmp_path):
    artifact = build(Store(tmp_path), files={"a.txt": "one", "scratch/b/c.txt": "two"})
    assert [entry["path"] for entry in artifact.manifest["files"]] == ["a.txt"]
    assert not (artifact.path / "scratch").exists()
    assert Store(tmp_path).verify(artifact) == []


def test_a_stage_killed_while_scratch_is_dropped_starts_again_without_any_of_it(tmp_path, monkeypatch):
    """Half of it would do harm: a file that says that another is whole, without that other."""
    store, remove = Store(tmp_path), shutil.rmtree
    files = {"a.txt": "one", "scratch/part.arrow": "part", "scratch/part.json": "the part is whole"}

    def killed(folder, **options):
        if (folder / "part.arrow").exists():
            (folder / "part.arrow").unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        build(store, files=files)
    out, begun = store.begin("clean", "f00d", ORIGIN)
    assert begun
    assert {path.name for path in out.rglob("*")} == {"a.txt", ".origin.json"}
    monkeypatch.undo()
    artifact = build(store, files=files)
    assert {path.name for path in artifact.path.rglob("*")} == {"a.txt", ".origin.json", "manifest.json"}


def test_a_damaged_manifest_is_told_and_the_others_are_still_listed(tmp_path):
    store = Store(tmp_path)
    build(store, "f00d")
    damaged = build(store, "beef").path / "manifest.json"
    damaged.chmod(0o644)
    damaged.write_text("{")
    assert [artifact.fingerprint for artifact in store.artifacts()] == ["f00d"]
    with pytest.raises(Damaged, match="remove that folder"):
        store.get("clean", "beef")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe{",
        b"\0" * 100,
        b"[" * 100_000,
        b"half",
        b"files",
        b"finished",
        b"inputs",
        b"other",
    ],
)
def test_whatever_is_in_a_damaged_manifest_is_told_in_one_line(tmp_path, damage):
    store = Store(tmp_path)
    path = build(store, "beef").path / "manifest.json"
    path.chmod(0o644)
    manifest = json.loads(path.read_text())
    changed = {
        b"half": path.read_bytes()[:-20],
        b"files": json.dumps(manifest | {"files": [1]}).encode(),
        b"finished": json.dumps(manifest | {"finished": "yesterday"}).encode(),
        b"inputs": json.dumps(manifest | {"inputs": {"download": None}}).encode(),
        b"other": json.dumps(manifest | {"fingerprint": "f00d"}).encode(),
    }
    path.write_bytes(changed.get(damage, damage))
    assert store.artifacts() == []
    with pytest.raises(Damaged, match="is damaged; remove that folder and run again"):
        store.get("clean", "beef")
    with pytest.raises(UserError, match=r"manifest\.json is damaged|holds no artifact"):
        in_folder(Graph(store), path.parent)


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest"])
def test_verify_sees_damage(tmp_path, damage):
    store = Store(tmp_path)
    artifact = build(store, files={"a.txt": "one", "logs/b.txt": "two"})
    file = artifact.path / "a.txt"
    if damage == "change":
        file.chmod(0o644)
        file.write_text("onE")
    elif damage == "remove":
        file.unlink()
    elif damage == "add":
        (artifact.path / "c.txt").write_text("three")
    else:
        manifest = json.loads((artifact.path / "manifest.json").read_text())
        manifest["files"][0]["sha256"] = "0" * 64
        (artifact.path / "manifest.json").chmod(0o644)
        (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    damaged = store.get("clean", "f00d")
    assert damaged is not None
    assert len(store.verify(damaged)) == (2 if damage == "manifest" else 1)


def test_logs_are_sealed_but_no_part_of_the_payload(tmp_path):
    first = build(Store(tmp_path / "1"), files={"a.txt": "one", "logs/time.txt": "now"})
    second = build(Store(tmp_path / "2"), files={"a.txt": "one", "logs/time.txt": "later"})
    other = build(Store(tmp_path / "3"), files={"a.txt": "ONE", "logs/time.txt": "now"})
    assert first.payload_sha256 == second.payload_sha256 != other.payload_sha256
    assert payload_checksum(first.manifest["files"]) == first.payload_sha256
    assert {entry["path"] for entry in first.manifest["files"]} == {"a.txt", "logs/time.txt"}


def test_checksums_that_workers_took_are_the_same(tmp_path, monkeypatch):
    files = {"a.txt": "one", "rejected/b.txt": "two", "scratch/c.txt": "three"}
    alone = build(Store(tmp_path / "1"), files=files)
    monkeypatch.setattr("flows.engine.store.SPREAD_BYTES", 0)
    store = Store(tmp_path / "2")
    out, _ = store.begin("clean", "f00d", ORIGIN)
    for path, text in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text)
    spread = store.seal("clean", "f00d", MANIFEST, LocalContext(2).map)
    assert spread.manifest["files"] == alone.manifest["files"]
    assert store.verify(spread) == []


def test_building_again_replaces_the_artifact_at_once(tmp_path):
    store = Store(tmp_path)
    build(store, files={"a.txt": "one"})
    build(store, files={"a.txt": "two"})
    artifact = store.get("clean", "f00d")
    assert artifact is not None
    assert (artifact.path / "a.txt").read_text() == "two"
    assert [path.name for path in artifact.path.parent.iterdir() if not path.name.startswith(".")] == ["f00d"]


HOLDER = """
import pathlib, sys, time
from flows.engine.store import Store
with Store(pathlib.Path(sys.argv[1])).lock("clean", "f00d"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_builder_is_free(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    lock = Store(tmp_path).lock("clean", "f00d")
    with pytest.raises(TimeoutError):
        lock.acquire(timeout=0)
    holder.kill()
    holder.communicate()
    lock.acquire(timeout=5)
    lock.release()
