"""The artifacts of a store as a graph: an edge leads from what was made to what it was made from.

Sealed artifacts name their inputs in the manifest. Unfinished ones know only the checksums of theirs, which lead to the
sealed artifacts with that payload. A training that began from a model which was exported here descends from it too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from flows.engine.store import ORIGIN, Artifact, Store
from flows.stages import BY_NAME
from llm.model.layouts import content_sha256, files_sha256

Key = tuple[str, str]
"""Stage and fingerprint."""
ORDER = list(BY_NAME)


@dataclass(frozen=True)
class Node:
    """An artifact: sealed, unfinished, or known only because another was made from it."""

    key: Key
    path: Path
    artifact: Artifact | None
    inputs: tuple[Key, ...] = ()

    @property
    def stage(self) -> str:
        return self.key[0]

    @property
    def fingerprint(self) -> str:
        return self.key[1]

    @property
    def state(self) -> str:
        if self.artifact:
            return "sealed"
        return "unfinished" if self.path.suffix == ".partial" else "missing"

    @property
    def name(self) -> str:
        """``dedup fefab43d463664e7``."""
        return f"{self.stage} {self.fingerprint}"


class Graph:
    """The artifacts of a store, and what came from what."""

    def __init__(self, store: Store) -> None:
        self.store = store
        unfinished = (
            store.unfinished()
        )  # first: what is sealed meanwhile is then found as the one or the other
        self._sealed = store.artifacts()
        self.nodes = {node.key: node for node in [*self._read_sealed(), *self._read_unfinished(unfinished)]}
        for key in {key for node in self.nodes.values() for key in node.inputs} - self.nodes.keys():
            self.nodes[key] = Node(key, store.path(*key), None)
        self._users: dict[Key, list[Key]] = {}
        for node in self.nodes.values():
            for key in node.inputs:
                self._users.setdefault(key, []).append(node.key)

    def _read_sealed(self) -> Iterator[Node]:
        for artifact in self._sealed:
            inputs = [one.key for one in artifact.inputs.values()]
            start = artifact.manifest["config"].get("init_sha256")
            inputs += self._exports.get(start, []) if start else []
            key = (artifact.stage, artifact.fingerprint)
            yield Node(key=key, path=artifact.path, artifact=artifact, inputs=tuple(inputs))

    def _read_unfinished(self, paths: Iterable[Path]) -> Iterator[Node]:
        by_payload: dict[tuple[str, str], list[Key]] = {}
        for artifact in self._sealed:
            payload = (artifact.stage, artifact.payload_sha256)
            by_payload.setdefault(payload, []).append((artifact.stage, artifact.fingerprint))
        sealed = {(artifact.stage, artifact.fingerprint) for artifact in self._sealed}
        for path in paths:
            key = (path.parent.name, path.name.removesuffix(".partial"))
            if key not in sealed:  # else it is being built again
                origin = read_json(path / ORIGIN).get("inputs", {})
                inputs = [one for payload in origin.values() for one in by_payload.get(tuple(payload), [])]
                inputs += self._start_of(path)
                yield Node(key=key, path=path, artifact=None, inputs=tuple(inputs))

    def _start_of(self, path: Path) -> list[Key]:
        """The exported model that an unfinished training began from, if it lies in this store."""
        start = read_json(path / "scratch" / "job.json").get("config", {}).get("init_from")
        found = Path(start).resolve() if start else None
        exports = (artifact for artifact in self._sealed if artifact.stage == "export")
        return [(one.stage, one.fingerprint) for one in exports if one.path.resolve() == found]

    @cached_property
    def _exports(self) -> dict[str, list[Key]]:
        """Exports by the identity that `pretrain.init_from` would give their content."""
        found: dict[str, list[Key]] = {}
        for artifact in self._sealed:
            if artifact.stage == "export":
                known = {entry["path"]: entry["sha256"] for entry in artifact.manifest["files"]}
                contents = []
                with suppress(
                    UserError
                ):  # damaged since it was sealed: `verify` says so, and nothing begins from it
                    contents.append(content_sha256(artifact.path))
                    contents.append(files_sha256(artifact.path, lambda path, known=known: known[path.name]))  # type: ignore[misc]
                for content in contents:
                    found.setdefault(content, []).append((artifact.stage, artifact.fingerprint))
        return found

    def ancestors(self, keys: Iterable[Key]) -> list[Node]:
        """All that some artifacts were made from, in the order of the pipeline, without themselves."""
        return self._reach(keys, lambda key: self.nodes[key].inputs)

    def descendants(self, keys: Iterable[Key]) -> list[Node]:
        """All that was made from some artifacts, in the order of the pipeline, without themselves."""
        return self._reach(keys, lambda key: self._users.get(key, ()))

    def _reach(self, keys: Iterable[Key], following: Callable[[Key], Iterable[Key]]) -> list[Node]:
        start = set(keys)
        found: set[Key] = set()
        waiting = list(start)
        while waiting:
            for key in following(waiting.pop()):
                if key not in found:
                    found.add(key)
                    waiting.append(key)
        return self.in_order(found - start)

    def in_order(self, keys: Iterable[Key]) -> list[Node]:
        """Some artifacts, each after what it was made from."""
        wanted, ordered = set(keys), dict[Key, None]()

        def visit(key: Key) -> None:
            if key not in ordered:
                for source in sorted(self.nodes[key].inputs, key=place):
                    visit(source)
                ordered[key] = None

        for key in sorted(wanted, key=place):
            visit(key)
        return [self.nodes[key] for key in ordered if key in wanted]

    def inputs_of(self, node: Node, stage: str) -> list[Node]:
        """The artifacts of a stage that one was made from directly."""
        return [self.nodes[key] for key in node.inputs if key[0] == stage]

    def named(self, fingerprint: str) -> Node | None:
        """The artifact whose fingerprint begins so; None where there is none.

        Raises:
            UserError: there are several.
        """
        found = [node for node in self.nodes.values() if node.fingerprint.startswith(fingerprint)]
        if len(found) > 1:
            names = ", ".join(sorted(node.name for node in found))
            raise UserError(f"{fingerprint} may be any of {names}: give more digits")
        return found[0] if found else None

    def alike(self, fingerprint: str) -> list[str]:
        """Fingerprints that one given wrong may have meant."""
        return difflib.get_close_matches(fingerprint, [key[1] for key in self.nodes], 3, 0.6)


def place(key: Key) -> tuple[int, str, str]:
    """Sorts by stage, in the order of the pipeline."""
    return (ORDER.index(key[0]) if key[0] in BY_NAME else len(ORDER), *key)


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a file; an empty one where there is none, or it is torn."""
    try:
        value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    except (OSError, json.JSONDecodeError):
        return {}
