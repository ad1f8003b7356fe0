"""Files of this machine as sources: folders, globs and the installed Python, listed with sizes and hashes."""

from __future__ import annotations

import glob
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256
from data_pipeline.discards import MOST_REASONS, named
from data_pipeline.download.archives import printable
from data_pipeline.download.formats import has_known_suffix, known_suffixes, suffix_of
from data_pipeline.download.sources import InstalledPythonSource, Listed, Listing, LocalSource


def list_local(source: LocalSource) -> Listing:
    """Return the files of a local source, sorted by name, hashed."""
    root, paths, left_out = local_files(source.path)
    readable = []
    for path in paths:
        if has_known_suffix(path.name, source.format):
            readable.append(path)
        else:
            left_out[suffix_of(path.name)] += 1
    if not readable:
        about = f"; left out: {named(+left_out, MOST_REASONS)}" if +left_out else ""
        raise UserError(
            f"source {source.name}: nothing to read at {source.path} ({len(paths)} files, none ending with "
            f"{known_suffixes()}; `format` sets that of others{about})"
            if paths
            else f"source {source.name}: no file at {source.path}{about}"
        )
    by_name = ((path.relative_to(root).as_posix(), path) for path in readable)
    return Listing(pin(by_name, source.max_bytes), +left_out)


def local_files(path: str) -> tuple[Path, list[Path], Counter[str]]:
    """Return the folder that names are relative to, the files that ``path`` (file, folder, glob) stands for, and what
    was passed over."""
    given = Path(path).expanduser().absolute()
    left_out = Counter[str]()
    if given.is_file():
        return given.parent, [given], left_out
    if given.is_dir():
        found = [Path(folder, name) for folder, _, names in walk(given, left_out) for name in names]
        return given, sorted(found, key=lambda one: one.relative_to(given).as_posix()), left_out
    fixed = Path(*_take_until_magic(given.parts))
    matches = {Path(match) for match in glob.glob(str(given), recursive=True)}  # `**` finds some twice
    files = sorted(match for match in matches if match.is_file())
    if "**" not in given.parts:
        left_out["folder"] += sum(match.is_dir() for match in matches)
    return fixed, files, +left_out


def _take_until_magic(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def walk(folder: Path, left_out: Counter[str] | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in order of name, without hidden files and folders, and without following links to folders.

    Args:
        left_out: counts what is passed over.
    """
    skipped = Counter[str]() if left_out is None else left_out

    def unreadable(error: OSError) -> None:
        skipped["unreadable folder"] += 1

    for here, folders, names in os.walk(folder, onerror=unreadable):
        for name in folders:
            if name.startswith("."):
                skipped["hidden folder"] += 1
            elif os.path.islink(os.path.join(here, name)):
                skipped["linked folder"] += 1
        skipped["hidden"] += sum(name.startswith(".") for name in names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, folders, sorted(name for name in names if not name.startswith("."))


OURSELVES = {"data_pipeline", "llm", "flows"}  # else a change to llmill would change its own corpus
PYTHON_TEXT = (".py", ".rst", ".md", ".txt")
NOT_LIBRARY = re.compile(
    r"(site-packages|dist-packages|__pycache__|.*\.(dist-info|egg-info|data)|__editable__.*)$"
)


def list_installed_python(source: InstalledPythonSource) -> tuple[Listed, ...]:
    """Text files of the running Python, as many as ``max_bytes`` admits, hashed."""
    return pin(installed_python_files(), source.max_bytes)


def installed_python_files() -> Iterator[tuple[str, Path]]:
    """(name, path) of the standard library's text files and then those of the installed packages, by name.

    Byte code and what an installer writes (metadata with paths and times, editable hooks) is left out.
    """
    paths = sysconfig.get_paths()
    roots = [
        ("stdlib", paths["stdlib"]),
        ("site-packages", paths["purelib"]),
        ("site-packages", paths["platlib"]),
    ]
    for prefix, root in {os.path.realpath(root): (prefix, root) for prefix, root in roots}.values():
        found = []
        for here, folders, names in walk(Path(root)):
            skipped = OURSELVES if here == root else set()
            folders[:] = [name for name in folders if name not in skipped and not NOT_LIBRARY.match(name)]
            found += [
                Path(here, name)
                for name in names
                if name.endswith(PYTHON_TEXT) and not NOT_LIBRARY.match(name)
            ]
        relative = sorted((path.relative_to(root).as_posix(), path) for path in found)
        yield from ((f"{prefix}/{name}", path) for name, path in relative)


def pin(files: Iterable[tuple[str, Path]], max_bytes: int | None = None) -> tuple[Listed, ...]:
    """Size and hash of files (name, path), until ``max_bytes`` are reached. Files are hashed in threads."""
    chosen: list[tuple[str, Path]] = []
    total = 0
    for name, path in files:
        if max_bytes is not None and total >= max_bytes:
            break
        try:
            total += path.stat().st_size
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from error
        chosen.append((printable(name), path))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return tuple(pool.map(lambda item: pin_file(*item), chosen))


def pin_file(name: str, path: Path) -> Listed:
    """One file as it is now.

    Raises:
        UserError: it can't be read.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"can't read {path}: it is no regular file")
        size = about.st_size
        return Listed(name=name, size=size, version=f"sha256:{file_sha256(path)}", location=str(path))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error


def check_unchanged(listed: Listed) -> None:
    """Make sure that a local file is what it was when the run was planned.

    Raises:
        UserError: it is gone or its content changed.
    """
    if pin_file(listed.name, Path(listed.location)) != listed:
        raise UserError(f"{listed.location} changed since the run was planned; run again")
