"""Content of the Hugging Face Hub: which commit it is, and its files."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.core.text import first_line
from llm.adopt.files import PATTERNS, Kind

COMMIT = r"[0-9a-f]{40}"
TIMEOUT_SECONDS = 30


def repository_type(kind: Kind) -> str:
    """Return the kind of repository of the hub that holds such a thing."""
    return "model" if kind in ("model", "tokenizer") else "dataset"


def find_commit(hub: str, revision: str | None, kind: Kind) -> str:
    """Find the commit that a revision (None: the main branch) stands for now.

    Raises:
        Unresolved: the hub can't be reached.
        UserError: it has no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().repo_info(
            hub, revision=revision, repo_type=repository_type(kind), timeout=TIMEOUT_SECONDS
        )
    except HFValidationError as error:
        raise UserError(f"adopt.hub: {hub} is no name of a repository: {first_line(error)}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"the Hugging Face Hub has no {kind} {hub}{at} that you may read") from None
    except Exception as error:  # offline, or what the Hub's HTTP client raises, which differs by version
        raise Unresolved(
            f"the Hugging Face Hub can't be asked for the revision of {hub} ({type(error).__name__}): "
            "give `revision` a full commit hash to plan without it"
        ) from error
    assert found.sha is not None
    return str(found.sha)


def download(hub: str, commit: str, kind: Kind, folder: Path) -> None:
    """Download the files of one kind of thing into a folder; those that are there whole are not asked for again.

    Raises:
        ConnectionError: the hub can't be reached, or no longer.
        UserError: it has no such commit that we may read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        snapshot_download(
            hub,
            revision=commit,
            repo_type=repository_type(kind),
            local_dir=folder,
            allow_patterns=list(PATTERNS[kind]),
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(f"the Hugging Face Hub has no {hub} at {commit} that you may read") from None
    except Exception as error:
        raise ConnectionError(
            f"{hub} can't be downloaded ({type(error).__name__}: {first_line(error)}): "
            "run again when the network is back"
        ) from error
