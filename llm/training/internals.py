"""The one room for what is no documented interface of DeepSpeed: attributes of its engine, of its ZeRO optimizers and
of the parameters that these have in hand. Other versions may name them otherwise; `tests/llm/test_internals.py` lists
them all, and what is taken from them is asserted where it can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from llm.training.muon import ShardLayout, Zero3Layout, Zero12Layout
from llm.training.state import Flat, Slice
from llm.training.tensor_parallel import Splitting


def compile_no_collectives(ops: Any) -> None:
    """Empty the table that ``deepspeed.ops`` fills by running compilers: the C++ collectives to build."""
    ops.__compatible_ops__ = {}


def layout(engine: Any, split: Splitting) -> list[Flat]:
    """List what this rank holds of the trained parameters of a DeepSpeed engine, at its ZeRO stage."""
    names = {parameter: split.own_name(name) for name, parameter in engine.module.named_parameters()}
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [
            Flat(
                parameter,
                optimizer.state[parameter],
                [Slice(name=name, start=0, at=0, count=parameter.numel())],
            )
            for parameter, name in names.items()
            if parameter.requires_grad
        ]
    flats = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    groups = optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups
    locate = whole_partition if stage == 3 else fragment
    laid = []
    for flat, parameters in zip(flats, groups, strict=True):
        slices = [locate(optimizer, parameter, names[parameter]) for parameter in parameters]
        laid.append(
            Flat(flat, optimizer.optimizer.state[flat], [one for one in slices if one and one.count > 0])
        )
    return laid


def fragment(optimizer: Any, parameter: Any, name: str) -> Slice | None:
    """Find where a parameter lies in this rank's partition at ZeRO 1 and 2: they lie end to end, cut anywhere."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Slice(name=name, start=here.start, at=there.start, count=here.numel)


def whole_partition(optimizer: Any, parameter: Any, name: str) -> Slice:
    """Find where a parameter lies in this rank's partition at ZeRO 3: cut into equal shards, the last padded."""
    _, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * optimizer._get_param_partition_rank(parameter)
    return Slice(name=name, start=start, at=at, count=min(size, parameter.ds_numel - start))


@contextmanager
def restoring(engine: Any) -> Iterator[None]:
    """Let the optimizer's flat tensors be written to inside, and give the model their values then. A collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    yield
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def shard_layouts(zero: Any, stage: int, members: list[set[int]]) -> dict[int, ShardLayout]:
    """Return the layout of each flat tensor that the optimizer sees under ZeRO, by its id.

    It is read from attributes that are no documented interface, so all that is taken from them is asserted:
    ``members`` are the ids of each group's parameters, as they were given.
    """
    layouts: dict[int, ShardLayout] = {}
    if stage == 3:
        for index, (flat, parameters) in enumerate(
            zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        ):
            assert {id(parameter) for parameter in parameters} <= members[zero.sub_group_to_group_id[index]]
            layout_3 = Zero3Layout(tuple(parameter.ds_shape for parameter in parameters))
            assert sum(size for _, size in layout_3.slices()) == flat.numel()
            layouts[id(flat)] = layout_3
        placed = sum(len(parameters) for parameters in zero.fp16_groups)
    else:
        flats, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        for flat, parameters, offsets, group in zip(
            flats, groups, zero.round_robin_bit16_offsets, members, strict=True
        ):
            assert {id(parameter) for parameter in parameters} == group
            shapes = tuple(parameter.shape for parameter in parameters)
            assert offsets[-1] + shapes[-1].numel() <= flat.numel() * dist.get_world_size()
            layouts[id(flat)] = Zero12Layout(shapes, tuple(offsets))
        placed = sum(len(parameters) for parameters in groups)
    assert placed == sum(map(len, members))
    return layouts
