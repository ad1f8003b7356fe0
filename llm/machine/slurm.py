"""Requests of a training to Slurm, when that starts its ranks: where `llmill run` is, there are no GPUs."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.stage import Runtime

TIME = r"^(\d+-)?\d+(:\d{2}){0,2}$"
OURS = (
    "--output",
    "--job-name",
    "--signal",
    "--open-mode",
    "--requeue",
    "--no-requeue",
    "--nodes",
    "--parsable",
)


class SlurmJob(Runtime):
    """The job that `flows.engine.slurm` submits."""

    nodes: int = Field(default=1, ge=1)
    """Machines, which share the ranks evenly."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """GPUs to ask for on each machine."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores to ask for on each machine."""
    partition: str | None = Field(default=None, min_length=1)
    """Where the job is queued; None: in the default partition."""
    account: str | None = Field(default=None, min_length=1)
    """Who is charged; None: the default account."""
    time: str | None = Field(default=None, pattern=TIME)
    """At most so long, as sbatch has it (``2-00:00:00``). A training that takes longer saves, and is queued again."""
    options: tuple[str, ...] = ()
    """More options of sbatch, each as one word: ``--constraint=h100``, ``--qos=low``."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the ranks start: ``module load cuda``, ``export NCCL_SOCKET_IFNAME=ib0``."""
    requeue: bool = True
    """Resume by itself after a preemption, the end of its time or the loss of a machine."""
    warn_seconds: int = Field(default=120, ge=1)
    """Seconds before the end of its time at which a training is asked to save."""
    poll_seconds: float = Field(default=10, gt=0)
    """Between questions to Slurm."""

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=\S.*)?", option):
                raise ValueError(f"{option!r} is no option of sbatch in one word, such as --constraint=h100")
            if option.partition("=")[0] in OURS:
                raise ValueError(f"{option}: llmill sets this option of sbatch itself")
        return options

    @model_validator(mode="after")
    def _two_ways_of_one(self) -> Self:
        named = {option.partition("=")[0] for option in self.options}
        for name in ("partition", "account", "time", "gpus_per_node"):
            if getattr(self, name) is not None and (option := f"--{name.replace('_', '-')}") in named:
                raise ValueError(f"{option} stands in options, and {name} is set as well: leave one out")
        return self

    def arguments(self) -> list[str]:
        """Return sbatch's arguments for it, besides the script and where that writes."""
        valued = {
            "--nodes": self.nodes,
            "--gpus-per-node": self.gpus_per_node,
            "--cpus-per-task": self.cpus_per_node,
            "--partition": self.partition,
            "--account": self.account,
            "--time": self.time,
            "--signal": f"B:TERM@{self.warn_seconds}",
        }
        given = [f"{name}={value}" for name, value in valued.items() if value is not None]
        again = "--requeue" if self.requeue else "--no-requeue"
        return [*given, "--ntasks-per-node=1", again, *self.options]
