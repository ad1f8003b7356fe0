"""Which registered model is used, and which wants to be: the aliases ``champion`` and ``candidate``."""

from __future__ import annotations

from collections.abc import Mapping

from flows.listeners.mlflow.description import clipped
from flows.listeners.mlflow.lineage import ModelVersion, Records

CANDIDATE, CHAMPION = "candidate", "champion"
DECIDED = "**The last decision**"


class Registry(Records):
    """MLflow's registry of models.

    Raises:
        NotAsked: on each call, where it does not answer.
    """

    def champion(self, name: str) -> ModelVersion | None:
        return self.version(name, CHAMPION)

    def promote(self, version: ModelVersion) -> None:
        """Make a version the champion; it is no candidate then any more."""
        with self._asking():
            self._client.set_registered_model_alias(version.name, CHAMPION, version.version)
            if CANDIDATE in version.aliases:
                self._client.delete_registered_model_alias(version.name, CANDIDATE)

    def describe(self, version: ModelVersion, decision: str) -> None:
        """Put the last decision at the end of a version's page."""
        with self._asking():
            known = self._client.get_model_version(version.name, version.version).description or ""
            text = f"{known.partition(DECIDED)[0].rstrip()}\n\n{DECIDED}\n\n{decision}"
            self._client.update_model_version(version.name, version.version, clipped(text))

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        with self._asking():
            for name, value in tags.items():
                self._client.set_model_version_tag(version.name, version.version, name, value)
