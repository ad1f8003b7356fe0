"""Files that are part of llmill, which a setting names from whatever folder: ``llmill://python_order.jsonl``."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.core.errors import UserError

SHIPPED = re.compile(r"llmill:/{1,2}(?P<name>.+)")  # a path has one slash for two
FOLDER = Path(__file__).parents[1] / "shipped"


def is_shipped(path: Path) -> bool:
    """Whether a setting names a file that llmill ships."""
    return SHIPPED.fullmatch(str(path)) is not None


def unshipped(path: Path, key: str) -> Path:
    """Return where a file lies that llmill ships; any other path as it is.

    Args:
        key: the setting that names it.

    Raises:
        UserError: there is no such file.
    """
    shipped = SHIPPED.fullmatch(str(path))
    if shipped is None:
        return path
    files = {one.name: one for one in FOLDER.iterdir()}
    if shipped["name"] not in files:
        raise UserError(f"{key}: llmill ships no {shipped['name']}, but {', '.join(sorted(files))}")
    return files[shipped["name"]]
