"""Program of each rank of a training job (``python -m llm.training.trainer JOB`` under torchrun): the loop over steps,
with validation, checkpoints and events. Step N's sequences and learning rate follow from N alone and nothing in the
model is random, so all the state there is lies in the checkpoint: after a kill the losses continue bit for bit.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.processes import die_with, has_ended
from data_pipeline.core.text import first_line
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer, token_bytes
from llm.data.loader import Loader, RankSlice
from llm.machine.nodes import launcher_pid
from llm.model.generate import generate
from llm.model.layouts import layout_of, load_weights
from llm.model.lora import FOLDER, add_adapters, merge, save_adapters
from llm.model.transformer import Transformer, load_model, model_of, save_model
from llm.pretrain import branches
from llm.training import checkpoint
from llm.training.engine import Asked, Engine, start_ranks
from llm.training.events import EventLog
from llm.training.failures import Interrupted, only_trainer, report_failure
from llm.training.job import Job
from llm.training.probe import matmul_rates, memory_bytes
from llm.training.recovery import History, SpikeDetector, skipped_sequences
from llm.training.resolved import Resolved
from llm.training.saver import Saved, Saver
from llm.training.scores import Scorer
from llm.training.signals import Requests
from llm.training.state import read_values, size_of


class Trainer:
    """One rank of a training."""

    def __init__(self, job: Job, rank: int, ranks: int) -> None:
        assert job.resolved is not None, "rank 0 works out what it is that the ranks compute with"
        self.job, self.config, self.resolved = job, job.config, job.resolved
        self.rank, self.ranks = rank, ranks
        self.data_parallel_size = self.resolved.data_parallel_size
        self.data_parallel_rank = rank * self.data_parallel_size // ranks
        data = job.data
        train, self.held_out = data.sequences("train"), data.sequences("val")
        model = make_model(job, self.resolved)
        self.parameters = model.parameter_count()
        self.branches = frozenset(self.config.kept_steps)
        self.objective = job.objective
        self.engine = Engine(model, self.resolved, self.objective)
        self.loader = Loader(
            train,
            data.order(train.counts),
            self.samples,
            RankSlice(self.data_parallel_rank, self.data_parallel_size, self.resolved.micro_batch),
            self.config.steps,
            pinned=self.engine.device.type == "cuda",
        )
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.token_bytes = torch.from_numpy(token_bytes(job.tokenizer)).to(self.engine.device)
        self.events = EventLog(job.events) if rank == 0 else None
        wanted = self.config.runtime.validate_on if rank == 0 and self.config.scores_every else None
        self.scorer = Scorer(wanted, job.tokenizer, job.model.context) if wanted else None
        self.saver = Saver(
            job.checkpoints,
            rank=rank,
            setup=job.setup,
            kept=self.kept_checkpoints(),
            patience=self.config.runtime.collective_timeout_seconds,
        )
        self.history: History = {"step": [], "validation": [], "skipped": []}
        self.spikes = SpikeDetector(
            self.config.recovery,
            max_nonfinite=self.config.runtime.max_nonfinite,
            max_rollbacks=self.config.runtime.max_rollbacks,
        )
        self.requests = Requests()
        self.seconds_a_token: float | None = None
        rate = max(matmul_rates(self.engine.device, self.resolved.precision).values())
        self.peak_flops = self.engine.sum(torch.tensor(rate, dtype=torch.float64)).item()

    def run(self) -> None:
        """Train to the end, from the newest whole checkpoint where there is one, and write the results.

        Raises:
            Interrupted: a signal asked to stop; the last step taken is saved.
            UserError: training diverged.
        """
        self.log_start()
        done = self.resume()
        self.requests.listen()
        if done == self.config.steps and done not in [one["step"] for one in self.history["validation"]]:
            self.validate(done)  # killed behind its last step, which is a branch point
        if self.job.start is not None and not done:
            self.validate(0)  # what it starts from
        with self.loader:
            while done < self.config.steps:
                done = self.advance(done)
        self.log_saved(self.saver.wait())
        self.spikes.require_any(self.history, self.config.steps)
        self.write_results()
        self.log("end", step=self.config.steps)

    def advance(self, step: int) -> int:
        """Take ``step`` (from 0), and do what is due after it; how many are done then, fewer after a rollback."""
        asked = self.train_step(step)
        done, last = step + 1, step + 1 == self.config.steps
        self.spikes.require_finite(self.history, done)
        self.log_saved(self.saver.poll())
        z = self.spikes.spike(self.history)
        if z is not None:
            done, last = self.roll_back(done, z), False
        else:
            if self.is_due(done, self.config.runtime.validation.every):
                self.validate(done)
            if self.is_due(done, self.config.samples_every):
                self.write_samples(done)
            if self.is_due(done, self.config.scores_every):
                self.score(done)
            due = done % self.config.runtime.checkpoint_every == 0 or self.spikes.saves_at(done)
            if done in self.branches or (not last and (due or asked.save or asked.stop)):
                self.save(done)
        if asked.stop and not last:
            self.leave(done)
        return done

    def train_step(self, step: int) -> Asked:
        """Take one optimizer step, remember and log it; return what was asked for meanwhile."""
        config = self.config
        lr_multiplier = config.schedule.lr_multiplier(step, config.steps)
        done = step + 1
        logged = self.is_due(done, config.runtime.log_every)
        norms = self.is_due(done, config.runtime.norms_every)
        start = time.perf_counter()
        taken = self.engine.step(
            self.loader.micro_batches(step),
            self.resolved.accumulation(step),
            lr_multiplier,
            measure=logged or norms,
            asked=self.requests.take(),
        )
        seconds = time.perf_counter() - start
        if not taken.applied:
            self.history["skipped"].append({"step": done, "reason": "nonfinite", "windows": 0})
            self.log("skip", step=done, loss=str(taken.loss), grad_norm=str(taken.grad_norm))
            return taken.asked
        fact = {
            "step": done,
            "tokens": config.tokens_after(done),
            "loss": taken.loss,
            "lr": config.lr * lr_multiplier,
            "grad_norm": taken.grad_norm,
        }
        self.history["step"].append(fact)
        if logged:
            self.log("step", **fact, **self.engine.group_facts(taken), **self.speed(step, seconds))
        if norms:
            self.log("norms", step=done, **self.engine.layer_facts(taken))
        return taken.asked

    def is_due(self, done: int, every: int) -> bool:
        """Return whether what comes every so many steps (0: never), and after the last one, comes after this one."""
        return every > 0 and (done % every == 0 or done == self.config.steps)

    def samples(self, step: int) -> tuple[int, int]:
        """Return what ``step`` reads, behind what came before and what rollbacks passed over: its first sample, and how
        many."""
        first, count = self.config.step_samples(step)
        return self.job.samples_before + first + skipped_sequences(self.history), count

    def validate(self, done: int) -> None:
        """Log what the objective measures on the same held-out sequences each time; a warning where it is not finite.

        The ranks take turns; one that runs out repeats the last sequence without weight, because at ZeRO 3 all must
        call the model equally often. Ranks that share sequences count them once each, which no ratio of sums notices.
        """
        sequences = np.arange(
            max(
                1, min(len(self.held_out), self.config.runtime.validation.tokens // self.config.model.context)
            )
        )
        size = self.resolved.micro_batch * self.data_parallel_size
        sums: list[Tensor] = []
        for start in range(0, len(sequences), size):
            indices = (
                start
                + self.data_parallel_rank
                + self.data_parallel_size * np.arange(self.resolved.micro_batch)
            )
            taken = np.minimum(indices, sequences[-1])
            batch = self.held_out.needed(self.held_out.take(taken), taken).to(self.engine.device)
            valid_B1 = torch.from_numpy(indices <= sequences[-1]).to(self.engine.device)[:, None]
            outputs = self.engine.measure(batch)
            sums.append(self.objective.sums(outputs, batch, valid_B1, self.token_bytes))
        facts = self.objective.facts(self.engine.sum(torch.stack(sums).sum(dim=0)).tolist())
        if not math.isfinite(facts["loss"]):
            return self.report_diverged(done)
        fact = {"step": done, **facts}
        self.history["validation"].append(fact)
        self.log("validation", **fact, tokens=self.config.tokens_after(done))

    def write_samples(self, done: int) -> None:
        """Log what the model writes after each prompt, by the same draws each time; a warning where it can't."""
        chosen = self.config.runtime.samples
        try:
            texts = generate(
                self.engine.next_logits,
                self.tokenizer,
                chosen.prompts,
                max_new_tokens=chosen.tokens,
                temperature=chosen.temperature,
                seeds=range(len(chosen.prompts)),
            )
        except FloatingPointError as error:
            return self.log("warning", message=f"no samples after step {done}: {error}")
        samples = [
            {"prompt": prompt, "text": text} for prompt, text in zip(chosen.prompts, texts, strict=True)
        ]
        self.log("samples", step=done, tokens=self.config.tokens_after(done), samples=samples)

    def score(self, done: int) -> None:
        """Log how the model does on `validate_on`; a warning where it can't be scored.

        Rank 0 scores a copy, in fp32 as ``evaluate`` does, so at every ZeRO stage alike; the others wait.
        """
        start = time.perf_counter()
        weights = self.engine.weights()
        if self.scorer:
            try:
                scores = self.scorer.scores(model_of(self.job.model, weights).to(self.engine.device))
            except (UserError, torch.OutOfMemoryError) as error:
                self.log("warning", message=f"no scores after step {done}: {first_line(error)}")
            else:
                facts = {"tokens": self.config.tokens_after(done), **scores}
                self.log("scores", step=done, **facts, seconds=round(time.perf_counter() - start, 3))
        dist.barrier()

    def report_diverged(self, done: int) -> None:
        """Warn that the held-out loss is not finite; after the last step that ends the run.

        Raises:
            UserError: it was the last step.
        """
        message = f"the held-out loss is not finite after step {done}: training diverged; lower pretrain.lr"
        if done == self.config.steps:
            self.spikes.require_any(self.history, done)
            raise UserError(message)
        self.log("warning", message=message)

    def save(self, done: int) -> None:
        """Begin a checkpoint: training waits for the copy in memory, not for the disk."""
        self.log_saved(self.saver.wait())
        since = time.perf_counter()
        slices = self.engine.snapshot()
        if self.rank == 0:
            checkpoint.begin(self.job.checkpoints, done, size=size_of(slices) * self.ranks)
        dist.barrier()
        history = {kind: list(facts) for kind, facts in self.history.items()}
        history["validation"] = self.regular(history["validation"])
        self.saver.start(done, slices, history, since)

    def regular(self, checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the checks without one that is there only for a run's end: one that lasts longer has it not."""
        return [check for check in checks if check["step"] % self.config.runtime.validation.every == 0]

    def kept_checkpoints(self) -> dict[str, Any]:
        """Find which checkpoints stay, in the words of `checkpoint.prune`."""
        runtime, recovery = self.config.runtime, self.config.recovery
        spare = recovery.rollback_every if recovery.spike_z else None
        return {
            "keep": runtime.keep_checkpoints,
            "every": runtime.keep_every,
            "spare": spare,
            "steps": self.branches,
        }

    def log_saved(self, saved: Saved | None) -> None:
        """Log a checkpoint that is whole."""
        if saved:
            self.log("checkpoint", step=saved.step, seconds=round(saved.seconds, 3), bytes=saved.bytes)

    def resume(self) -> int:
        """Load the newest whole checkpoint; return the number of steps already taken."""
        newest = self.newest_checkpoint()
        if newest is None:
            if self.job.branch and self.job.keep_optimizer:
                self.engine.restore(self.job.branch)
            if self.spikes.saves_at(0):
                self.save(0)
            return 0
        checkpoint.require_same_training(newest, self.job.setup)
        if changed := checkpoint.changes(newest, self.job.setup):
            self.log("warning", message=changed)
        self.load(newest)
        self.log("resume", step=newest.step)
        return newest.step

    def roll_back(self, done: int, z: float) -> int:
        """Resume from an earlier checkpoint after a spike in step ``done``, past the batches since; return its step.

        That is saved again with what is to be skipped, so that a start after a kill knows.
        """
        self.log_saved(self.saver.wait())
        until, plan = self.spikes.rollback_to(self.history, done), self.config.plan
        target = self.newest_checkpoint(until)
        assert target is not None, f"no whole checkpoint up to step {until} to roll back to"
        spike = {"step": done, "reason": "spike", "loss": self.history["step"][-1]["loss"], "z": round(z, 3)}
        sequences = plan.sequences_before(done) - plan.sequences_before(target.step)
        self.load(target)
        self.history["skipped"].append({**spike, "windows": sequences})
        self.log("rollback", **spike, to=target.step, windows=sequences)
        self.save(target.step)
        self.log_saved(self.saver.wait())
        dist.barrier()
        return target.step

    def newest_checkpoint(self, until: int | None = None) -> checkpoint.Checkpoint | None:
        """Find the newest whole checkpoint, of at most ``until`` steps; torn and later ones are removed."""
        found: list[Any] = [None]
        if self.rank == 0:
            found[0], problems = checkpoint.recover(self.job.checkpoints, until)
            for message in problems:
                self.log("warning", message=message)
        dist.broadcast_object_list(found)
        return found[0]

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Load state and history of ``saved``. A collective."""
        root = self.job.checkpoints
        self.engine.restore(checkpoint.folder_of(root, saved.step))
        self.history = checkpoint.read_history(root, saved)

    def leave(self, done: int) -> None:
        """End because a signal asked to, when all is on disk."""
        self.log_saved(self.saver.wait())
        self.log("interrupted", step=done)
        dist.barrier()
        raise Interrupted(f"interrupted after step {done}, which is saved: run it again to resume")

    def write_results(self) -> None:
        """Write the artifact's files, the model last: it marks them as complete."""
        weights = self.engine.weights()
        if self.rank == 0:
            for kind, name in (("step", "losses"), ("validation", "validation")):
                with atomic_path(self.job.out / f"{name}.parquet") as path:
                    pq.write_table(pa.Table.from_pylist(self.history[kind]), path, compression="zstd")
            if self.history["skipped"]:
                with atomic_path(self.job.out / "skipped.parquet") as path:
                    pq.write_table(pa.Table.from_pylist(self.history["skipped"]), path, compression="zstd")
            if self.job.lora is not None:
                weights, adapters = merge(weights, self.job.lora)
                head = weights["lm_head.weight"] if self.job.model.labels else None
                layout = layout_of(self.job.model)
                save_adapters(adapters, self.job.lora, self.job.out / FOLDER, layout=layout, head=head)
            for step in self.branches:
                saved = checkpoint.folder_of(self.job.checkpoints, step)
                checkpoint.copy(saved, self.job.out / branches.FOLDER / saved.name)
            save_model(self.job.model, weights, self.job.out)
        dist.barrier()

    def log_start(self) -> None:
        """Log the event that opens a run."""
        config, resolved = self.config, self.resolved
        self.log(
            "start",
            precision=resolved.precision,
            reason=resolved.precision_reason,
            parameters=self.parameters,
            steps=config.steps,
            tokens=config.tokens_after(config.steps),
            ranks=self.ranks,
            zero_stage=resolved.zero_stage,
            attention=resolved.attention,
            matmul=resolved.matmul,
            micro_batch=resolved.micro_batch,
            matmul_flops=self.peak_flops,
        )

    def log(self, event: str, **fields: Any) -> None:
        """Log an event, on rank 0."""
        if self.events is not None:
            self.events.write(event, **fields)

    def speed(self, step: int, seconds: float) -> dict[str, float]:
        """Return tokens a second, memory (bytes, of this rank), time left (s), and MFU: the model FLOPs over what
        the ranks' matrix products reached when probed at the start."""
        config = self.config
        tokens = config.plan.sequences_at(step) * config.model.context
        rate = tokens / seconds
        previous = self.seconds_a_token
        self.seconds_a_token = 1 / rate if previous is None else 0.9 * previous + 0.1 / rate
        left = config.tokens_after(config.steps) - config.tokens_after(step + 1)
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.job.model.flops_per_token() / self.peak_flops,
            "memory": memory_bytes(),
            "eta_seconds": left * self.seconds_a_token,
        }


def make_model(job: Job, resolved: Resolved) -> Transformer:
    """Return the model of a job as its first step finds it: what is not trained takes no gradient."""
    model = Transformer(
        job.model,
        seed=job.config.seed,
        z_loss=job.config.z_loss,
        back_end=resolved.attention,
        matmul=resolved.matmul,
        checkpointing=resolved.activation_checkpointing,
    )
    if job.branch is not None:
        read_values(model, job.branch)
    elif job.start is not None:
        begin(model, load_model(job.start))
    elif job.config.init_from is not None:
        load_weights(model, job.config.init_from)
    if job.lora is not None:
        add_adapters(model, job.lora, job.config.seed)
    elif job.last_blocks is not None:
        model.requires_grad_(False)
        for module in (*model.layers[-job.last_blocks :], model.norm):
            module.requires_grad_(True)
    if job.model.labels:
        model.lm_head.requires_grad_(True)
    return model


def begin(model: Transformer, start: Transformer) -> None:
    """Give a model the weights of another; but to one that gives labels, whose head is new, not the head's."""
    weights = start.state_dict()
    if model.config.labels:
        weights["lm_head.weight"] = model.lm_head.weight.detach()
    model.load_state_dict(weights)


def resolved_by_rank_0(job: Job) -> Job:
    """Return the job with what its ranks compute with, worked out on rank 0 where their starter couldn't. A collective.

    Raises:
        UserError: something that is asked for cannot run here.
    """
    if job.resolved:
        return job
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        job = job.resolve()
        job.write()
        found[0] = job.resolved
    dist.broadcast_object_list(found)
    return job.model_copy(update={"resolved": found[0]})


def main(path: Path) -> None:
    """Run one rank of the job in ``path``; exit code 1 when it fails."""
    parent = launcher_pid()
    if parent != os.getpid():
        die_with(parent)
    job = Job.model_validate_json(path.read_text(encoding="utf-8"))
    try:
        with only_trainer(job.scratch) if os.environ["RANK"] == "0" else nullcontext():
            rank, ranks = start_ranks(job.config.runtime.collective_timeout_seconds)
            Trainer(resolved_by_rank_0(job), rank, ranks).run()
    except Exception as error:
        try:
            if not has_ended(
                parent
            ):  # else we fail because the others are gone, and a new job may be reading
                report_failure(error, job.out / "logs")
        finally:
            # Not sys.exit: threads of collectives that the other ranks will never answer would keep us alive.
            os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is on disk, and all ranks know it. As an interpreter ends, C++ threads of collectives that still run abort it.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
