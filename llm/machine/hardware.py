"""Hardware that this machine trains on: its device, the precision that it computes in, and how many ranks have room."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data_pipeline.core.errors import UserError
from llm.machine.gpus import gpus
from llm.machine.nodes import nodes_for, rank_capacity


def device_kind() -> Literal["cpu", "cuda"]:
    """Return what ranks on this machine compute on."""
    return "cuda" if gpus() else "cpu"


def hardware_precision() -> tuple[Literal["fp32", "bf16"], str]:
    """Return the precision in which this machine multiplies matrices fastest without loss of range, and why."""
    if gpus():
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{torch.cuda.get_device_name()} computes in it"
        return "fp32", f"{torch.cuda.get_device_name()} does not compute in bf16"
    flags = cpu_flags()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return "bf16", f"this processor computes in it ({flag})"
    return "fp32", "this processor has neither amx_bf16 nor avx512_bf16"


CPUINFO = Path("/proc/cpuinfo")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Return the processor's features as Linux lists them; empty elsewhere."""
    return frozenset(first_entry("flags", cpuinfo).split())


def cpu_vendor(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's vendor, as it reports it ("GenuineIntel", "AuthenticAMD"); empty outside Linux."""
    return first_entry("vendor_id", cpuinfo)


def first_entry(name: str, cpuinfo: Path) -> str:
    """Return what Linux reports of the first processor under that name."""
    if not cpuinfo.exists():
        return ""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(name)), "").partition(":")[2].strip()


def require_ranks(ranks: int) -> None:
    """Refuse more ranks than there is room for.

    Raises:
        UserError: more than GPUs or, without any, processor cores, on this machine and those that share the work.
    """
    nodes, (room, kind) = nodes_for(ranks), rank_capacity()
    if ranks > room * nodes.count:
        who = "this machine has" if nodes.count == 1 else f"{nodes.count} machines like this one have"
        raise UserError(
            f"pretrain.runtime.ranks is {ranks}, but {who} {room * nodes.count} {kind}:\n"
            f"set pretrain.runtime.ranks to at most {room * nodes.count}"
        )
    nodes.rendezvous(ranks)
