"""Settings of the stage ``adopt`` that a recipe may give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import content_sha256
from data_pipeline.stage import StageConfig
from llm.adopt.files import Kind, find_files
from llm.adopt.hub import COMMIT, find_commit


class AdoptConfig(StageConfig):
    """Description of what is adopted: where it lies, and what is known of it."""

    type: Kind
    """Kind of it, and so what the step makes; a model's tokenizer lies beside it and is adopted with it."""
    path: Path | None = None
    """The folder (or file, of a tokenizer or of documents) that holds it. Its content is identity, where it lies is
    not."""
    hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """In place of `path`: OWNER/NAME on the Hugging Face Hub."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the hub, resolved to a commit; of a folder, whatever its maker calls it."""
    license: str | None = Field(default=None, min_length=1)
    """Under which it may be used; the model card names it."""
    origin: str | None = Field(default=None, min_length=1)
    """Where it comes from, in words; the model card names it."""
    end_of_text: str | None = Field(default=None, min_length=1)
    """Token of a tokenizer that ends documents. None: found in what lies beside it."""

    any_architecture: bool = False
    """Whether to adopt a model too that only `transformers` computes: it can be scored, and nothing else. Changes
    nothing of what is made."""

    _content: str | None = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("say where it is: path (a folder or file) or hub (OWNER/NAME), one of the two")
        if self.end_of_text is not None and "tokenizer" not in self.makes():
            raise ValueError(f"end_of_text is a tokenizer's, and {self.type} have none: drop it")
        return self

    def makes(self) -> tuple[str, ...]:
        return ("model", "tokenizer") if self.type == "model" else (self.type,)

    def resolve(self) -> Self:
        """Return a copy that knows the content of what is at `path`, or the commit that `revision` stands for.

        Raises:
            UserError: there is nothing of this type, or it can't be used.
            Unresolved: the hub can't be reached.
        """
        if self.hub is not None:
            known = self.revision is not None and re.fullmatch(COMMIT, self.revision)
            commit = self.revision if known else find_commit(self.hub, self.revision, self.type)
            return self.model_copy(update={"revision": commit})
        assert self.path is not None
        path = self.path.expanduser().absolute()
        files = find_files(path, self.type, any_architecture=self.any_architecture)
        if "tokenizer" in self.makes():
            from llm.adopt.tokenizer import examine  # Only a plan that adopts one reads tokenizers

            examine(files, self.end_of_text, path)
        now = content_sha256(files)
        if self._content not in (None, now):
            raise UserError(f"{path} changed since the run was planned: run again")
        resolved = self.model_copy(update={"path": path})
        resolved._content = now
        return resolved

    def identity(self) -> dict[str, Any]:
        """As for any stage, with the hash of what `path` holds in place of where it lies."""
        identity = super().identity()
        del identity["any_architecture"]
        if identity.pop("path") is not None:
            assert self._content is not None, "resolve() the config first"
            identity["content_sha256"] = self._content
        return identity
