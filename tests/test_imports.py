"""No file imports another that imports it, on whatever way, imports inside functions and for types counted; and an
import inside a function spares the callers of others a library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREES: dict[Path, ast.Module] = {}
ROOMS = ("data_pipeline", "llm", "flows", "benchmarks")


def modules() -> dict[str, Path]:
    """Each module's file, by its name."""
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of ours that a file names in an import, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in within}
    return names & known.keys()


def at_import(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Name the modules, of ours and of others, that a file imports when it is imported itself."""
    within = {id(node) for one in functions(path) for node in ast.walk(one)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            within |= {id(one) for one in ast.walk(node)}
    return {name for node in ast.walk(parsed(path)) if id(node) not in within for name in named(node, known)}


def parsed(path: Path) -> ast.Module:
    return TREES.setdefault(path, ast.parse(path.read_text(encoding="utf-8")))


def functions(path: Path) -> list[ast.AST]:
    return [
        node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def named(node: ast.AST, known: Mapping[str, Path]) -> set[str]:
    """Name the modules of an import."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name if name in known else node.module for name in inner}
    return set()


def libraries(module: str, graph: Mapping[str, set[str]], seen: set[str]) -> set[str]:
    """Name the modules of others that come with a module."""
    if module not in graph:
        return set() if module.partition(".")[0] in sys.stdlib_module_names else {module}
    packages = ".".join(module.split(".")[:-1])
    following = graph[module] | ({packages} if packages in graph else set())
    found: set[str] = set()
    for other in following - seen:
        seen.add(other)
        found |= libraries(other, graph, seen)
    return found


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Groups of modules each of which leads to all others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    waiting: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        index[name] = low[name] = len(index)
        waiting.append(name)
        for other in graph[name]:
            if other not in index:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in waiting:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = waiting[waiting.index(name) :]
            del waiting[waiting.index(name) :]
            if len(group) > 1:
                yield sorted(group)

    for name in graph:
        if name not in index:
            yield from visit(name)


def test_no_modules_import_each_other() -> None:
    known = modules()
    graph = {name: imported(path, known) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > 1000, "the graph is that of the project"
    assert list(circles(graph)) == []


def test_an_import_inside_a_function_spares_a_library() -> None:
    """Of the commands that don't need it, of a machine that lacks it, or of a worker that never calls that function."""
    known = {name: path for name, path in modules().items() if not name.startswith("benchmarks")}
    graph = {name: at_import(path, known) for name, path in known.items()}
    needless, count = [], 0
    for name, path in known.items():
        have = libraries(name, graph, {name})
        for node in (one for function in functions(path) for one in ast.walk(function)):
            for other in named(node, known):
                count += 1
                if not libraries(other, graph, {other}) - have:
                    needless.append(f"{path.relative_to(ROOT)}:{node.lineno}: {other} can be imported above")
    assert count > 50, "they are found"
    assert not needless, "\n".join(needless)


def test_a_circle_is_found() -> None:
    graph: dict[str, set[str]] = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert list(circles(graph)) == [["a", "b", "c"]]


def test_matplotlib_is_imported_in_one_place() -> None:
    """By two threads at once, it is given half to one of them: `flows.drawing`."""
    drawing = {
        name
        for name, path in modules().items()
        if not name.startswith("benchmarks")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(one.name.startswith("matplotlib") for one in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matplotlib"))
    }
    assert drawing == {"flows.drawing"}
