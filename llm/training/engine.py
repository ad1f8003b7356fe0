"""DeepSpeed, and the only import of it: a model and its optimizer spread over the ranks by ZeRO (Rajbhandari et
al. 2019, arXiv:1910.02054), behind the few calls that the training loop needs. Parameters stay fp32; bf16 means
that matrix products run in it (autocast), so every ZeRO stage computes the same numbers up to rounding. DeepSpeed's
JSON is derived from `Resolved` here and nowhere else. Of DeepSpeed nothing is compiled: the optimizer is
torch's own, and the shared-memory collectives (a minute of C++ for ranks on CPUs) are left out.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes for accelerators, and logs it

if "mlflow" not in sys.modules:
    # DeepSpeed's autotuner imports MLflow where it can, which takes each rank a second.
    sys.modules["mlflow"] = None  # type: ignore[assignment]

import deepspeed
from deepspeed.sequence.layer import DistributedAttention

from llm.data.sequences import Batch
from llm.training import internals, state
from llm.training.compiled import compile_layers
from llm.training.norms import Meter, Norms, layer_of, norms_by
from llm.training.objective import NEXT_TOKEN, Objective, Outputs
from llm.training.optimizer import Optimizer, parameter_groups, trained
from llm.training.probe import Clock
from llm.training.tensor_parallel import Splitting, autotp

if TYPE_CHECKING:
    from llm.model.transformer import Transformer
    from llm.training.resolved import Resolved

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]

# DeepSpeed calls collectives by names that torch has renamed, and torch warns at each call.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def start_ranks(timeout_seconds: float = 600) -> tuple[int, int]:
    """Join the process group that torchrun described in the environment; this rank and how many there are.

    A collective that the others do not answer within ``timeout_seconds`` raises.
    """
    timeout = timedelta(seconds=timeout_seconds)
    # For the groups that DeepSpeed makes of its own, which would wait half an hour.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    internals.compile_no_collectives(deepspeed.ops)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size()


def deepspeed_config(resolved: Resolved) -> dict[str, Any]:
    """Return the JSON that DeepSpeed wants, derived from ours."""
    count, split = resolved.accumulation(0), resolved.tensor_parallel
    return {
        # It does not know yet of ranks that work on the same sequences.
        "train_batch_size": resolved.micro_batch * count * resolved.ranks,
        "train_micro_batch_size_per_gpu": resolved.micro_batch,
        "gradient_accumulation_steps": count,
        # At stage 0 we clip, because DeepSpeed does not return the norm there.
        "gradient_clipping": resolved.optimizer.grad_clip if resolved.zero_stage else 0.0,
        "zero_optimization": {"stage": resolved.zero_stage, **offload_config(resolved)},
        "zero_force_ds_cpu_optimizer": False,  # theirs is compiled at its first use, and is no Muon
        "zero_allow_untested_optimizer": True,  # ours; tests hold it to its rule at each stage
        "torch_autocast": {
            "enabled": resolved.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients travel in fp32
        },
        "steps_per_print": 1 << 40,
    } | ({"tensor_parallel": autotp(split)} if split > 1 else {})


def offload_config(resolved: Resolved) -> dict[str, Any]:
    """Return DeepSpeed's settings for what leaves the device between its uses."""
    if resolved.offload == "none":
        return {}
    target = {"device": resolved.offload, "pin_memory": resolved.device == "cuda"}
    return {"offload_optimizer": target} | ({"offload_param": target} if resolved.zero_stage == 3 else {})


@dataclass(frozen=True)
class Asked:
    """Requests of a rank to all of them after a step."""

    save: bool = False
    stop: bool = False


@dataclass(frozen=True)
class Step:
    """Result of an optimizer step, the same on all ranks."""

    loss: float
    """Mean over the global batch, in nats."""
    grad_norm: float
    """Norm of the gradient, before clipping."""
    squares: dict[str, list[float]]
    """Sums of squares by parameter, when measured: `Engine.squares`."""
    applied: bool
    """False where loss or gradients were not finite: then nothing moved."""
    asked: Asked
    """Requests by any rank."""


def spoilt_where_not_finite(loss: Tensor) -> Tensor:
    """Return ``loss``, with gradients of NaN where it is not finite itself: so the gradients' norm shows both."""
    return loss * (loss.detach() * 0 + 1)


class Engine:
    """A model in training on all ranks. Every method is a collective: all ranks call it together."""

    def __init__(self, model: Transformer, resolved: Resolved, objective: Objective = NEXT_TOKEN) -> None:
        self.objective = objective
        on_gpu = resolved.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.clock = Clock()
        self.clip, self.context = resolved.optimizer.grad_clip, resolved.context
        self.zero_stage = resolved.zero_stage
        model = model.to(self.device)
        self.sharing = Sharing(resolved.sequence_parallel)
        self.sharing.apply(model)
        self.splitting = Splitting(resolved.tensor_parallel)
        self.splitting.prepare(model)
        self.uncompiled: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context in which layers run as they are written: for shapes that it would not pay to compile."""
        if resolved.compile:
            compile_layers(model)
            self.uncompiled = partial(torch.compiler.set_stance, "force_eager")
        groups = parameter_groups(model, resolved.optimizer)
        kinds = {id(parameter): group["kind"] for group in groups for parameter in group["params"]}
        self.kinds = {name: kinds[id(parameter)] for name, parameter in trained(model)}
        """Kind of each parameter that is trained, by its name."""
        products = torch.bfloat16 if resolved.precision == "bf16" else torch.float32
        self.optimizer = Optimizer(groups, resolved.optimizer, products)
        members = [{id(parameter) for parameter in group["params"]} for group in groups]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(resolved),
            dist_init_required=False,
        )
        if self.zero_stage:
            self.optimizer.layouts = internals.shard_layouts(self.engine.optimizer, self.zero_stage, members)
        flats = internals.layout(self.engine, self.splitting)
        self.meter = Meter(self.kinds, flats, self.splitting, self.device)

    @property
    def module(self) -> nn.Module:
        """The model. At ZeRO 3 its parameters are empty outside `forward`."""
        return self.engine.module

    def step(
        self,
        micro_batches: Iterable[Batch],
        count: int,
        lr_multiplier: float,
        measure: bool = False,
        asked: Asked = Asked(),
    ) -> Step:
        """Take one optimizer step over this rank's ``count`` micro-batches.

        Each group's rate is its peak times ``lr_multiplier``. With ``measure``, norms are measured too.
        Where loss or gradients are not finite on any rank, nothing moves on all: at ZeRO 1 to 3 DeepSpeed itself
        discards a step whose gradient's norm is not finite, at stage 0 we do. ``asked`` travels with the loss.
        """
        self.clock.start()
        self.engine.train()
        self.set_accumulation(count)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_multiplier
        self.optimizer.meter = self.meter.reset() if measure else None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        norm = 0.0
        done = 0
        for done, batch in enumerate(micro_batches, start=1):
            self.clock.lap("data")
            self.engine.set_gradient_accumulation_boundary(done == count)
            batch = batch.to(self.device)
            loss = self.objective.loss(self.outputs(batch, self.objective.trained_by), batch)
            if batch.weight != 1.0:
                loss = loss * batch.weight
            total += loss.detach()
            self.clock.lap("forward")
            self.engine.backward(spoilt_where_not_finite(loss))
            self.clock.lap("backward")
            if self.zero_stage == 0 and done == count:
                norm = float(nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.clip))
                if not math.isfinite(norm):
                    self.engine.zero_grad()  # to None: the optimizer passes over such parameters
            self.engine.step()
            self.clock.lap("optimizer")
        assert done == count, f"{done} micro-batches came, not {count}"
        if self.zero_stage:
            norm = float(self.engine.get_global_grad_norm())
        reduced = torch.stack([total / count, total.new_tensor(asked.save), total.new_tensor(asked.stop)])
        loss_sum, save, stop = self.sum(reduced).tolist()
        return Step(
            loss_sum / dist.get_world_size(),
            norm,
            self.squares() if measure else {},
            applied=math.isfinite(norm),
            asked=Asked(save=save > 0, stop=stop > 0),
        )

    def squares(self) -> dict[str, list[float]]:
        """Return, by parameter, the squares that `meter` found, over the ranks."""
        squares_P3 = self.meter.squares_P3
        if self.zero_stage:
            squares_P3 = self.sum(squares_P3)
        return dict(zip(self.meter.names, squares_P3.tolist(), strict=True))

    def norms_by(self, labels: Mapping[str, str], step: Step) -> dict[str, Norms]:
        """Return the norms in a measured step over all parameters that have the same of ``labels``."""
        # As torch and DeepSpeed clip: each slice that the optimizer sees is scaled by this.
        return norms_by(labels, step.squares, clipped=min(1.0, self.clip / (step.grad_norm + 1e-6)))

    def group_facts(self, step: Step) -> dict[str, float]:
        """Return a measured step's learning rate and update-to-weight ratio of each kind of parameter, as an event
        has them: ``lr_matrices``, ``update_ratio_matrices``, ..."""
        rates = {f"lr_{group['kind']}": group["lr"] for group in self.optimizer.param_groups}
        kinds = self.norms_by(self.kinds, step)
        return rates | {f"update_ratio_{kind}": norms.update_ratio for kind, norms in kinds.items()}

    def layer_facts(self, step: Step) -> dict[str, float]:
        """Return a measured step's norms of each layer, as an event has them: ``grad/block_00`` (before clipping),
        ``update/block_00``, ``update_ratio/block_00``, ..."""
        layers = self.norms_by({name: layer_of(name) for name in self.kinds}, step)
        return {
            f"{norm}/{layer}": getattr(norms, norm)
            for norm in ("grad", "update", "update_ratio")
            for layer, norms in layers.items()
        }

    def set_accumulation(self, count: int) -> None:
        """Let the next step average its gradient over ``count`` micro-batches.

        `step` sets where they end: DeepSpeed's own count of micro-batches runs on from step to step, so after a
        change of their number it would see a step end where none does.
        """
        self.engine.set_train_batch_size(
            count * self.engine.train_micro_batch_size_per_gpu() * self.engine.dp_world_size
        )

    @torch.no_grad()
    def measure(self, batch: Batch) -> Tensor:
        """Return what the objective measures a held-out batch by, of all positions, on this rank's device."""
        self.engine.eval()
        return self.sharing.whole(self.outputs(batch.to(self.device), self.objective.measured_by))

    @torch.inference_mode(False)  # weights that ZeRO 3 gathered in that mode could not be trained
    @torch.no_grad()
    def next_logits(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Return logits ``(V,)``, on the CPU and the same on all ranks, of what follows each sequence of tokens.

        All ranks call it with the same sequences; of one that is longer than the context the last tokens are read.

        Raises:
            FloatingPointError: some are not a number.
        """
        windows = [tokens[-self.context :] for tokens in sequences.values()]
        longest = max(map(len, windows))
        padded = [[*window, *[0] * (longest - len(window))] for window in windows]
        self.engine.eval()
        with self.sharing.apart(), self.uncompiled():
            logits_BTV = self.engine(torch.tensor(padded, device=self.device))
        last_BV = torch.stack([row[len(window) - 1] for row, window in zip(logits_BTV, windows, strict=True)])
        # What is drawn from them decides what all ranks read next.
        dist.broadcast(last_BV, 0)
        if last_BV.isnan().any():
            raise FloatingPointError("the model's logits are not finite")
        return dict(zip(sequences, last_BV.cpu(), strict=True))

    def outputs(self, batch: Batch, wanted: Outputs) -> Tensor:
        """Return what the model's `forward` makes of this rank's positions of a batch on this device."""
        cut = self.sharing.slice
        # Documents are for attention, which sees all positions whoever has them.
        given: dict[str, Any] = {"documents_BT": batch.documents_BT}
        if batch.positions_BT is not None:  # in packed rows, which ranks never share
            given["positions_BT"] = batch.positions_BT
        if wanted != "logits":
            given |= {"targets_BT": cut(batch.targets_BT), "reduction": wanted}
            if batch.counted_BT is not None:
                given["counted_BT"] = batch.counted_BT
        outputs: Tensor = self.engine(cut(batch.tokens_BT), **given)
        return outputs

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks."""
        value = value.to(self.device)
        dist.all_reduce(value)
        return value

    def snapshot(self) -> dict[str, Tensor]:
        """Return this rank's shard of parameters and optimizer, in host memory: see `llm.training.state`."""
        flats = internals.layout(self.engine, self.splitting)
        return state.snapshot(flats, self.splitting, replicated=self.zero_stage == 0)

    def restore(self, folder: Path) -> None:
        """Take parameters and optimizer from the snapshots in ``folder``, however they were spread when made."""
        with internals.restoring(self.engine):
            flats = internals.layout(self.engine, self.splitting)
            state.restore(flats, folder, fused=self.optimizer.defaults["fused"])

    def weights(self) -> dict[str, Tensor]:
        """Return all parameters in fp32 on the CPU, on rank 0; elsewhere an empty dict. A tied head is left out."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                whole = self.splitting.whole(name, parameter.detach())
                if dist.get_rank() == 0:
                    weights[name] = whole.to("cpu", torch.float32, copy=True).contiguous()
        return weights


class Sharing:
    """Groups of neighbouring ranks that share sequences: each has an equal slice of the positions.

    Only attention looks across positions, so around it ranks exchange: each gets all positions, for some of the
    heads, and gives them back (DeepSpeed's `DistributedAttention`). All else stays as if each rank had sequences of its
    own: the mean over the ranks of the means over their positions is the mean over the batch.
    """

    def __init__(self, size: int) -> None:
        ranks = range(dist.get_world_size())
        self.size, self.index = size, dist.get_rank() % size
        groups = [dist.new_group(list(ranks[first : first + size])) for first in ranks[::size]]
        self.group = groups[dist.get_rank() // size]

    def apply(self, model: Transformer) -> None:
        """Let ``model`` work on this rank's positions."""
        self.model, self.alone = model, model.attend
        if self.size == 1:
            return
        exchange = DistributedAttention(self.alone, self.group, scatter_idx=2, gather_idx=1)
        # Not the module itself, which would become a part of the model.
        model.attend = lambda q_BTHE, k_BTKE, v_BTKE, documents: exchange(
            q_BTHE, k_BTKE, v_BTKE, 0, None, documents
        )
        model.first_position = self.index * (model.config.context // self.size)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let each rank's model work on whole sequences inside."""
        shared = self.model.attend, self.model.first_position
        self.model.attend, self.model.first_position = self.alone, 0
        yield
        self.model.attend, self.model.first_position = shared

    def slice(self, whole_BT: Tensor) -> Tensor:
        """Return this rank's positions of what has all."""
        return whole_BT.chunk(self.size, dim=1)[self.index]

    def whole(self, slice_BT: Tensor) -> Tensor:
        """Gather all positions of what each rank of the group has for its own. A collective."""
        if self.size == 1:
            return slice_BT
        slices = [torch.empty_like(slice_BT) for _ in range(self.size)]
        dist.all_gather(slices, slice_BT.contiguous(), group=self.group)
        return torch.cat(slices, dim=1)
