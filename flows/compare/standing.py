"""How a sweep stands while it runs, in MLflow: on its own run, and on one for the seeds of each setting."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.core.text import table
from flows.compare.members import Ended, Member, ranking_metrics
from flows.engine.store import Artifact, Store
from flows.headline import BITS
from flows.listeners.markdown import plain
from flows.listeners.mlflow.findings import Finding
from flows.listeners.mlflow.lineage import PARENT
from flows.listeners.mlflow.points import Point
from flows.listeners.mlflow.translate import Operation, measured, text_of
from flows.recipe import flatten


class Standing:
    """The scores of those members that have ended."""

    def __init__(self, store: Store, members: Sequence[Member], ended: Sequence[Ended]) -> None:
        self._members, self._ended = members, ended
        self._made: dict[int, Artifact] = {}
        """Place among the members -> the evaluation, of those that have a finite score."""
        self.scores: dict[int, float] = {}
        """Place of a member -> bits per byte, in the order in which they ran."""
        names = ranking_metrics(members)
        for one in ended:
            made = None if one.failure else store.get("evaluate", one.evaluation)
            found = [made.metrics[name] for name in names if made and name in made.metrics]
            if made and found and math.isfinite(found[0]):
                place = members.index(one.member)
                self._made[place], self.scores[place] = made, found[0]

    @property
    def note(self) -> str:
        """The best so far, and a table of all members, in Markdown."""
        scores = self.scores
        state = {self._members.index(one.member): "failed" for one in self._ended if one.failure}
        state |= {place: f"{score:.4f}" for place, score in scores.items()}
        rows = [(plain(member.name), state.get(place, "")) for place, member in enumerate(self._members)]
        lines = [f"{len(self._ended)} of {len(self._members)} runs have ended", ""]
        if scores:
            best = min(scores, key=lambda place: scores[place])
            name = plain(self._members[best].name)
            lines[0] = f"least so far: {scores[best]:.4f} bits per byte, {name} · {lines[0]}"
        return "\n".join([*lines, table(("run", "bits per byte"), rows, ["---", "---:"])])

    def points(self) -> list[Point]:
        """Return the members' scores as metrics whose step is a member's number, with the least until each."""
        found, least = list[Point](), math.inf
        for place, score in self.scores.items():
            stamp, least = self._made[place].sealed_at, min(least, score)
            metrics = {f"sweep/{BITS}": score, f"sweep/least_{BITS}": least}
            found += [(name, value, stamp, place + 1) for name, value in metrics.items()]
        return found

    def summary(self) -> list[Point]:
        """Mean, standard deviation and number of the scores, which are of seeds of one setting; none without any."""
        scores = [*self.scores.values()]
        if not scores:
            return []
        metrics = {"mean": float(np.mean(scores)), "n": float(len(scores))}
        if len(scores) > 1:
            metrics["sd"] = float(np.std(scores, ddof=1))
        stamp = max(made.sealed_at for made in self._made.values())
        return [(f"seeds/{name}", value, stamp, len(scores)) for name, value in metrics.items()]


class SeedGroups:
    """Runs in MLflow between a sweep's and its members': one for each setting, with the mean of its seeds.

    There are none where the sweep is of one setting, whose seeds its own run sums up, or has one seed of each.
    """

    def __init__(self, home: Path, sweep: str, members: Sequence[Member]) -> None:
        self._store, self._sweep = Store(home), sweep
        self._members: dict[str, list[Member]] = {}
        for member in members:
            self._members.setdefault(member.setting, []).append(member)
        self._findings: dict[str, Finding] = {}
        if 1 < len(self._members) < len(members):
            self._findings = {
                setting: Finding(home, members[0].recipe.name, "seeds", f"{setting}, {len(seeds)} seeds", key)
                for setting, seeds in self._members.items()
                for key in [hashlib.sha256(f"{sweep} {setting}".encode()).hexdigest()[:32]]
            }

    def parent_of(self, member: Member) -> str:
        """Return the key of the run that a member's stands under."""
        finding = self._findings.get(member.setting)
        return finding.key if finding else self._sweep

    def begin(self) -> None:
        """Begin the groups' runs, or resume them."""
        for setting, finding in self._findings.items():
            finding.hold()
            self._report(setting, [])

    def note(self, setting: str, ended: Sequence[Ended]) -> None:
        """Report the scores of a setting's seeds so far."""
        if setting in self._findings:
            self._report(setting, [one for one in ended if one.member.setting == setting])

    def end(self, ended: Sequence[Ended], status: str = "") -> None:
        """End the groups' runs, with a ``status`` or as their members did."""
        for setting in self._findings:
            own = [one for one in ended if one.member.setting == setting]
            failed = any(one.failure for one in own)
            self._report(setting, own, status or ("FAILED" if failed else "FINISHED"))

    def _report(self, setting: str, ended: Sequence[Ended], status: str = "") -> None:
        """Log all there is of a group; where MLflow is away, it waits, as the sweep's own report says."""
        finding, members = self._findings[setting], self._members[setting]
        standing = Standing(self._store, members, ended)
        points = standing.summary()
        means = [("evaluate/bits_per_byte", *point[1:]) for point in points if point[0] == "seeds/mean"]
        run = {"run": finding.key}
        more: list[Operation] = [
            {"op": "link", **run, "tag": PARENT, "to": self._sweep, "id": ""},
            {"op": "params", **run, "params": params_of(members[0])},
        ]
        if points:
            more.append(measured(finding.key, [*points, *means]))
        tags: Mapping[str, str] = {"llmill.recipe": members[0].recipe.name}
        finding.report(tags, note=described(standing, setting), status=status, more=more)


def params_of(member: Member) -> dict[str, str]:
    """Return the params in which a member's group differs from others, as the run of a recipe has them."""
    config = flatten({step.name: step.config.identity() for step in member.steps if step.config})
    names = [setting.partition("=")[0] for setting in member.grid]
    return {name: text_of(config[name]) for name in names if name in config}


def described(standing: Standing, setting: str) -> str:
    """The page of a group, in Markdown."""
    summary = {name.partition("/")[2]: value for name, value, *_ in standing.summary()}
    if "sd" not in summary:
        return f"{plain(setting)}\n\n{standing.note}"
    mean = f"{summary['mean']:.4f} bits per byte, standard deviation {summary['sd']:.4f} over {summary['n']:.0f} seeds"
    return f"{mean}\n\n{standing.note}"
