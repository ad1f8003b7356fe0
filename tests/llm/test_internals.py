"""What is asked of the machine, and what is touched of DeepSpeed's inside, is each in one room (read from syntax)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "llm/training/internals.py"
RESOLVING = ROOT / "llm/training/resolved.py"
DEVICE = {"device_kind", "hardware_precision", "choose_matmul", "choose"}
"""Functions that look at the machine (`choose` is that of attention)."""
DEEPSPEED_FILES = ("runtime/engine.py", "runtime/zero/stage3.py", "runtime/zero/stage_1_and_2.py")
DOCUMENTED = {
    "module", "optimizer", "dp_world_size", "train_micro_batch_size_per_gpu", "set_train_batch_size", "step",
    "set_gradient_accumulation_boundary", "get_global_grad_norm", "backward", "zero_grad", "train", "eval",
    "zero_optimization_stage",
}  # fmt: skip
"""What the engine uses of DeepSpeed's that its documentation or its examples name."""
USED = {
    # of deepspeed.ops
    "__compatible_ops__",
    # of the optimizers at ZeRO 1 and 2
    "bit16_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets", "single_partition_of_fp32_groups",
    "update_lp_params",
    # of that at ZeRO 3
    "_get_param_partition_rank", "_reassign_or_swap_out_partitioned_parameters", "checkpoint_event_epilogue",
    "checkpoint_event_prologue", "fp16_groups", "fp32_partitioned_groups_flat", "get_param_id", "grad_position",
    "sub_group_to_group_id",
    # of parameters
    "_hp_mapping", "ds_numel", "ds_shape", "hp_fragment_address", "lp_fragment_address",
}  # fmt: skip
"""Every name that is no documented interface of DeepSpeed and that we use."""


def trees(*rooms: str) -> Iterator[tuple[Path, ast.Module]]:
    for room in rooms:
        for path in (ROOT / room).rglob("*.py"):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def attributes(tree: ast.AST) -> set[str]:
    """Names behind a dot, but those of the object whose method it is."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def of_deepspeed() -> set[str]:
    """Attributes and methods of its engine and of its ZeRO optimizers, from their sources."""
    folder = Path(deepspeed.__file__).parent
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in DEEPSPEED_FILES)
    names = set(re.findall(r"\bself\.(\w+)", text)) | set(re.findall(r"\bdef (\w+)\(self", text))
    known = set(dir(torch.Tensor)) | set(dir(torch.nn.Module)) | set(dir(torch.optim.Optimizer))
    return names - known - set(dir(dict)) - {"state", "param_groups"}


def test_the_inside_of_deepspeed_is_touched_in_one_room_and_this_is_all_of_it() -> None:
    assert USED - {"__compatible_ops__"} <= attributes(ast.parse(ROOM.read_text(encoding="utf-8")))
    theirs = of_deepspeed() - DOCUMENTED
    in_room = attributes(ast.parse(ROOM.read_text(encoding="utf-8")))
    private = {name for name in in_room if name.startswith(("_", "ds_"))}
    assert (in_room & theirs) | private | {"hp_fragment_address", "lp_fragment_address"} == USED
    for path, tree in trees("llm", "flows", "benchmarks"):
        if path != ROOM:
            assert not attributes(tree) & USED, path


def test_the_engine_uses_nothing_else_of_deepspeeds() -> None:
    engine = ast.parse((ROOT / "llm/training/engine.py").read_text(encoding="utf-8"))
    of_engine = {
        node.attr
        for node in ast.walk(engine)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "engine"
    }
    assert of_engine <= DOCUMENTED
    assert not {name for name in attributes(engine) if name.startswith("_")}


def test_only_what_resolves_a_training_asks_the_machine() -> None:
    asked = set()
    for path, tree in trees("llm", "flows"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if called in DEVICE and path.parent.name != "evaluate":  # whose `choose` is of documents
                    asked.add((path.relative_to(ROOT).as_posix(), called))
    assert asked == {("llm/training/resolved.py", name) for name in DEVICE}
