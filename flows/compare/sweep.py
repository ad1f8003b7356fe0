"""A recipe run with all combinations of some settings and seeds, in turn or side by side, as one parent in MLflow.

Each is a run like any other: what earlier ones sealed is reused, and a sweep that was stopped is resumed where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from data_pipeline.core.files import write_durably
from flows.compare.claims import FIRST, SECOND, Claim
from flows.compare.compare import Comparison, compare
from flows.compare.fixed import RIGHT
from flows.compare.log import files, note
from flows.compare.member_run import MemberRun, NoVerdict, carry_out, require_documents
from flows.compare.members import Ended, Member
from flows.compare.side_by_side import CarryOut, shares, side_by_side
from flows.compare.standing import SeedGroups, Standing
from flows.compare.subjects import Finder, Subject, label
from flows.compare.verdict import Verdict
from flows.engine.continuation import read_record
from flows.engine.store import Store, canonical_json
from flows.listeners.mlflow.findings import Finding
from flows.listeners.mlflow.translate import Operation, measured
from flows.listeners.terminal import Terminal, TerminalListener
from llm.score.statistics import MIN_DOCUMENTS


def forecast(members: Sequence[Member]) -> Iterator[tuple[Member, int, int, list[str]]]:
    """For each member: how many steps are sealed, how many an earlier one builds, and those that it builds itself."""
    seen: set[tuple[str, str]] = set()
    for member in members:
        waiting = [step for step in member.steps if step.action != "reuse"]
        keys = {step.name: (step.stage.name, str(step.fingerprint)) for step in waiting}
        builds = [name for name, key in keys.items() if key not in seen]
        seen.update(keys.values())
        yield member, len(member.steps) - len(waiting), len(waiting) - len(builds), builds


def foresee(members: Sequence[Member]) -> list[str]:
    """Warn of what the comparison at the end will not be able to show, as far as that is known before anything runs.

    Raises:
        NoVerdict: it will not be able to show anything.
    """
    for member in members:
        most = member.config("evaluate").max_documents
        if member.scored_on:
            continue
        if most is not None and most < MIN_DOCUMENTS:
            raise NoVerdict(
                f"evaluate.max_documents is {most}, and {MIN_DOCUMENTS} are needed to compare models:\nraise it"
            )
        for step in member.steps:
            if step.action == "reuse" and step.artifact:
                require_documents(step.artifact)
    warnings = []
    models: dict[str, list[str]] = {}
    for member in members:
        made = str(member.step("pretrain").fingerprint)
        models.setdefault(made, []).append(member.name)
    warnings += [f"{' and '.join(names)} make the same model" for names in models.values() if len(names) > 1]
    if len({member.held_out_by for member in members}) > 1:
        on = members[0].scored_on
        warnings.append(
            "the runs differ in settings that decide which documents are held out: "
            + (f"{on} decides" if on else "models can be compared only where these come out the same")
        )
    settings = {tuple(member.grid) for member in members}
    if len(settings) == len(members):
        warnings.append(
            "one seed of each: this shows which model is better, not which setting; --seeds 3 would show it"
        )
    return warnings


def best_of(verdict: Verdict, members: Sequence[Member]) -> tuple[Member | None, str]:
    """The member that should be the candidate, and what the tests say of it; None where nothing can be decided.

    It is the best seed of the recipe with the least bits per byte, and not for being the last that was made.
    """
    ranking = verdict.ranking
    if ranking is None:
        return None, f"no candidate is named, for which is best can't be decided: {verdict.refused}"
    group = min(verdict.groups, key=lambda one: one.mean)
    place = min(group.models, key=lambda one: ranking.bits_per_byte[one])
    claims = verdict.recipes if verdict.scores else claims_on(ranking.name, verdict)
    beaten = {claim.second for claim in claims if (claim.first, claim.outcome) == (group.name, FIRST)}
    beaten |= {claim.first for claim in claims if (claim.second, claim.outcome) == (group.name, SECOND)}
    unsure = [one.name for one in verdict.groups if one is not group and one.name not in beaten]
    if unsure:
        why = f"it has the least, but is not shown to be better than {', '.join(unsure)}"
    elif len(verdict.groups) > 1:
        why = "its recipe is shown to be better than every other"
    else:
        why = "the least among seeds of one recipe, which is chance"
    bits = f"{ranking.bits_per_byte[place]:.4f} bits per byte" + (
        "" if verdict.scores else f" on {ranking.name}"
    )
    return members[place], f"candidate: {members[place].name}, {bits}: {why}"


def claims_on(name: str, verdict: Verdict) -> list[Claim]:
    """Return the claims about recipes by bits per byte on a set or task."""
    return [one.claim for one in verdict.fixed_recipes if one.name == name and one.metric != RIGHT]


class Sweep:
    """The runs of a sweep, and their parent in MLflow."""

    def __init__(
        self, members: Sequence[Member], home: Path, terminal: Terminal, command: str, *, name: str = ""
    ) -> None:
        self.members, self.home, self.terminal, self.command = members, home, terminal, command
        recipe = members[0].recipe.name
        plan = hashlib.sha256(canonical_json([member.key for member in members]).encode()).hexdigest()[:16]
        self._record = home / "runs" / f"sweep-{recipe}-{plan}.json"
        record = read_record(self._record)
        self._done: dict[str, str] = record.get("done", {})
        settings = dict.fromkeys(one.partition("=")[0] for member in members for one in member.chosen)
        name = name or f"sweep over {', '.join(setting.rpartition('.')[2] for setting in settings)}"
        self._finding = Finding(home, recipe, "sweep", name, record.get("key", ""))
        self._ended: list[Ended] = []
        self._groups = SeedGroups(home, self._finding.key, members)
        self._tags = {"llmill.recipe": recipe, "llmill.sweep.settings": ", ".join(settings)}

    def run(self, file: Path, jobs: int = 1) -> list[Ended]:
        """Run all members of the recipe in a file, ``jobs`` at once; one that fails leaves the others going.

        Raises:
            UserError: there are too few GPUs for so many at once.
            NoVerdict: the sweep could not show anything when all of it was trained.
        """
        environments = shares(jobs) if jobs > 1 else []
        self._save()
        self._finding.hold()
        self._report()
        self._groups.begin()
        try:
            running = self._side_by_side(file, environments) if environments else self._in_turn(file)
            with closing(running):
                for ended in running:
                    self._note(ended)
        except NoVerdict as error:
            self._groups.end(self._ended, "FAILED")
            self._report(text=str(error), status="FAILED")
            raise
        return sorted(self._ended, key=lambda one: self.members.index(one.member))

    def _note(self, ended: Ended) -> None:
        """Report that a member has ended, and how the sweep stands."""
        if ended.failure:
            self.terminal.note(ended.failure, warning=True)
        else:
            self._done[ended.member.key] = ended.key
            self._save()
        self._ended.append(ended)
        standing = self._standing()
        self._report(text=standing.note, more=self._metrics(standing))
        self._groups.note(ended.member.setting, self._ended)

    def _in_turn(self, file: Path) -> Generator[Ended]:
        listener = TerminalListener(self.terminal)
        for number in range(1, len(self.members) + 1):
            yield self._member(number, file, lambda run, recipe: carry_out(run, recipe, listener))

    def _side_by_side(self, file: Path, environments: Sequence[Mapping[str, str]]) -> Generator[Ended]:
        work = [partial(self._member, number, file) for number in range(1, len(self.members) + 1)]

        def show(number: int, line: str) -> None:
            self.terminal.console.print(f"{number} │ {line}")

        return side_by_side(work, environments, show)

    def finish(self, ended: Sequence[Ended]) -> Comparison | None:
        """Put what ended well side by side, name the best the candidate, and end the parent; None where fewer than two
        did.
        """
        well = [one for one in ended if not one.failure]
        comparison = compare(self._subjects(well)) if len(well) > 1 else None
        if comparison:
            text, evidence = note(comparison), files(comparison)
        else:
            text, evidence = "fewer than two runs ended well", {}
        best, reason = best_of(comparison.verdict, [one.member for one in well]) if comparison else (None, "")
        text = "\n\n".join(filter(None, (reason, self._standing().note, text)))
        self.conclude(ended, text=text, evidence=evidence, more=best.candidate if best else [])
        if reason:
            self.terminal.note(reason)
        return comparison

    def conclude(
        self,
        ended: Sequence[Ended],
        *,
        text: str,
        evidence: Mapping[str, str] | None = None,
        more: Sequence[Operation] = (),
    ) -> None:
        """End the parent with a text for its page and files; the sweep is not resumed where all ended well."""
        well = not any(one.failure for one in ended)
        self._groups.end(ended)
        self._report(evidence, text, "FINISHED" if well else "FAILED", more)
        if well:
            self._record.unlink(missing_ok=True)

    @property
    def key(self) -> str:
        """The key by which its run is found in MLflow."""
        return self._finding.key

    def stop(self) -> None:
        """Report to MLflow that a person stopped it; the same command resumes it."""
        self._groups.end(self._ended, "KILLED")
        self._report(status="KILLED")

    def _standing(self) -> Standing:
        return Standing(Store(self.home), self.members, self._ended)

    def _metrics(self, standing: Standing) -> list[Operation]:
        """The operations that draw the members' scores on the sweep's run, and what its seeds come to if it has but
        those."""
        seeds = standing.summary() if len({member.setting for member in self.members}) == 1 else []
        points = [*standing.points(), *seeds]
        return [measured(self._finding.key, points)] if points else []

    def _report(
        self,
        evidence: Mapping[str, str] | None = None,
        text: str = "",
        status: str = "",
        more: Sequence[Operation] = (),
    ) -> None:
        if why_not := self._finding.report(self._tags, evidence, note=text, status=status, more=more):
            self.terminal.note(f"the sweep is not in MLflow yet: {why_not}", warning=True)

    def _member(self, number: int, file: Path, carry_out: CarryOut) -> Ended:
        """Carry out a member, the first of which has number 1, unless that was done before the sweep was stopped."""
        member = self.members[number - 1]
        self.terminal.title(f"\n{number} of {len(self.members)}  ·  {member.name}")
        evaluation = str(member.step("evaluate").fingerprint)
        if member.key in self._done and all(step.action == "reuse" for step in member.steps):
            self.terminal.note("it ended well before this sweep was stopped")
            return Ended(member, evaluation, self._done[member.key])
        parent = self._groups.parent_of(member)
        run = MemberRun.of(member, file=file, home=self.home, command=self.command, parent=parent)
        try:
            return Ended(member, evaluation, carry_out(run, member.recipe))
        except NoVerdict:
            raise
        except Exception as error:
            return Ended(member, failure=str(error) or type(error).__name__)

    def _subjects(self, ended: Sequence[Ended]) -> list[Subject]:
        finder = Finder(Store(self.home))
        return [
            finder.of_evaluation(one.evaluation, label(place), one.member.name, one.key)
            for place, one in enumerate(ended)
        ]

    def _save(self) -> None:
        """Note which members are done, for a sweep that resumes this one."""
        self._record.parent.mkdir(parents=True, exist_ok=True)
        write_durably(
            self._record, json.dumps({"key": self._finding.key, "done": self._done}, allow_nan=False)
        )
