"""Files on the Hugging Face Hub that a setting names as `fsspec` does: ``hf://datasets/OWNER/NAME@REVISION/FILE``."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.core.text import first_line

ON_HUB = re.compile(r"hf:/{1,2}(?P<rest>.+)")  # a path has one slash for two
NAMED = re.compile(r"datasets/(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def local(path: Path, key: str) -> Path:
    """Return where a file lies here: itself, or the copy of one on the hub, which is downloaded once a revision.

    Args:
        key: the setting that names it.

    Raises:
        UserError: it names no file there that you may read.
        Unresolved: the hub can't be reached, and there is no copy yet.
    """
    on_hub = ON_HUB.fullmatch(str(path))
    if on_hub is None:
        return path
    named = NAMED.fullmatch(on_hub["rest"])
    if named is None:
        raise UserError(
            f"{key}: {path} names no file of a data set on the hub: write hf://datasets/OWNER/NAME@REVISION/FILE"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision, file = named["repository"], named["revision"], named["file"]
    at = f" at {revision}" if revision else ""
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        raise UserError(
            f"{key}: the Hugging Face Hub has no file {file} in the data set {repository}{at} that you may read "
            f"({type(error).__name__})"
        ) from None
    except LocalEntryNotFoundError as error:
        raise Unresolved(
            f"{key}: {path} can't be downloaded now: {first_line(error.__cause__ or error)}"
        ) from None
    except Exception as error:  # what the hub's HTTP client raises, which differs by version
        raise Unresolved(
            f"{key}: {path} can't be downloaded ({type(error).__name__}: {first_line(error)})"
        ) from None
