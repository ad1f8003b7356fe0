"""The machines that the ranks of a training are divided among, as the environment names them: none but this one;
those of a Slurm job, on which ``srun`` starts commands; or any that a person names an endpoint for, in
``LLMILL_NODES`` and ``LLMILL_ENDPOINT``, and starts by hand. Ranks find each other at the endpoint (torchrun's c10d
rendezvous), which gives each machine its number. All machines must see the store's folder under one path.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_pipeline.core.errors import UserError
from data_pipeline.core.processes import cores
from llm.machine.gpus import gpus

PORTS = range(20_000, 30_000)
"""Where jobs of Slurm meet: below the ports that systems give to clients."""


@dataclass(frozen=True)
class Nodes:
    """How many machines there are, where their ranks meet, and who starts them."""

    count: int = 1
    endpoint: str = ""
    """host:port on the first machine."""
    started_by: Literal["us", "srun", "hand"] = "us"

    def rendezvous(self, ranks: int) -> list[str]:
        """Return torchrun's arguments, on each machine, to make its group of ``ranks`` ranks.

        Raises:
            UserError: they can't be divided evenly.
        """
        if ranks % self.count:
            raise UserError(
                f"pretrain.runtime.ranks is {ranks}, which {self.count} machines cannot share evenly:\n"
                f"set pretrain.runtime.ranks to a multiple of {self.count}"
            )
        here = f"--nproc-per-node={ranks // self.count}"
        if self.count == 1:
            return ["--standalone", here]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", "--rdzv-id=llmill"]
        return [f"--nnodes={self.count}", here, *meeting]

    def everywhere(self, command: list[str]) -> list[str]:
        """Return ``command`` so that it runs on all machines that are ours to start."""
        if self.started_by != "srun":
            return command
        each = [f"--nodes={self.count}", f"--ntasks={self.count}", "--ntasks-per-node=1"]
        return ["srun", *each, "--kill-on-bad-exit=1", *command]


def rank_capacity() -> tuple[int, str]:
    """Count the ranks this machine has room for, and name what each takes: a GPU or, without any, a processor core."""
    found = gpus()
    return (found, "GPUs") if found else (cores(), "processor cores")


def launcher_pid(environment: Mapping[str, str] = os.environ) -> int:
    """Return the process of this machine that started the ranks and must outlive them; our own where there is none."""
    elsewhere = environment.get("LLMILL_PARENT_HOST", socket.gethostname()) != socket.gethostname()
    return os.getpid() if elsewhere else int(environment.get("LLMILL_PARENT", os.getpid()))


def nodes_for(ranks: int, environment: Mapping[str, str] = os.environ) -> Nodes:
    """Find the machines for ``ranks`` ranks.

    In a Slurm job as few of its machines as have room; else those of ``LLMILL_NODES``.

    Raises:
        UserError: ``LLMILL_NODES`` is no number, or lacks an endpoint.
    """
    named = environment.get("LLMILL_NODES", "1")
    if not named.isdecimal() or int(named) < 1:
        raise UserError(f"LLMILL_NODES is {named!r}: set it to the number of machines, or unset it")
    if int(named) > 1:
        endpoint = environment.get("LLMILL_ENDPOINT", "")
        if not endpoint.rpartition(":")[2].isdecimal() or ":" not in endpoint:
            raise UserError(
                f"LLMILL_NODES is {named}, but LLMILL_ENDPOINT is {endpoint!r}:\n"
                "set it to HOST:PORT of the first machine, the same on all"
            )
        return Nodes(int(named), endpoint, "hand")
    wanted = math.ceil(ranks / rank_capacity()[0])
    if int(environment.get("SLURM_JOB_NUM_NODES", "1")) < wanted:
        return Nodes()
    return first_of_slurm(wanted, environment)


def nodes_of_slurm(environment: Mapping[str, str] = os.environ) -> Nodes:
    """Return all machines of the Slurm job that runs this process on its first."""
    return first_of_slurm(int(environment["SLURM_JOB_NUM_NODES"]), environment)


def first_of_slurm(count: int, environment: Mapping[str, str]) -> Nodes:
    """Return so many machines of a Slurm job, this one among them."""
    if count == 1:
        return Nodes()
    port = PORTS[int(environment["SLURM_JOB_ID"]) % len(PORTS)]
    return Nodes(count, f"{socket.gethostname()}:{port}", "srun")
