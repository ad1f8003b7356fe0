"""Nats of answers under a model: those of the one that training starts from, which are computed once and kept beside
the rows, and those of whole answers of a held-out pair. Shape suffixes: R rows, T positions.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path, file_sha256
from data_pipeline.core.pinned_files import content_sha256
from data_pipeline.stage import StageContext
from llm.data.packed import REFERENCE, Conversation, PackedRows, lay_out
from llm.model.transformer import Transformer, load_model
from llm.training.resolved import MICRO_BATCH_TOKENS, Precision

KEPT = "reference"
"""Folder of an artifact for the nats of its rows under the model that it started from."""


@torch.inference_mode()
def row_nats(
    model: Transformer, rows_3RT: NDArray[np.int32], precision: Precision, report: Callable[[int], None]
) -> NDArray[np.float32]:
    """Return the nats of each target of packed rows ``(R, T)``, 0 where it does not count; ``report`` is told
    how many more rows are done."""
    device = model.embed_tokens.weight.device
    rows = PackedRows([rows_3RT])
    at_once = max(1, MICRO_BATCH_TOKENS["cuda" if device.type == "cuda" else "cpu"] // rows_3RT.shape[2])
    found = np.zeros(rows_3RT.shape[1:], np.float32)
    for start in range(0, len(rows), at_once):
        indices = np.arange(start, min(start + at_once, len(rows)))
        batch = rows.needed(rows.take(indices), indices).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            nats_BT = model(
                batch.tokens_BT,
                batch.targets_BT,
                "none",
                batch.documents_BT,
                positions_BT=batch.positions_BT,
                counted_BT=batch.counted_BT,
            )
        found[indices, : nats_BT.shape[1]] = nats_BT.float().cpu().numpy()
        report(len(indices))
    return found


def write_references(
    start: Path, folder: Path, precision: Precision, *, out: Path, context: StageContext
) -> None:
    """Write the nats of the rows in ``folder`` under the model in ``start``, where that is not done yet.

    They are sealed with the step in ``out`` (`KEPT`), under a name that stands for all that they follow from, and taken
    from an earlier step beside it that has them.
    """
    paths = [path for path in sorted(folder.glob("*.npy")) if not path.name.endswith(REFERENCE)]
    names = {path: f"{key}.npy" for path, key in zip(paths, keys(start, paths, precision), strict=True)}
    total = done = 0

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        context.progress(done, total, "rows under the reference")

    (out / KEPT).mkdir(parents=True, exist_ok=True)
    missing = [path for path in paths if not path.with_suffix(REFERENCE).exists()]
    for path in list(missing):
        if earlier := sealed(out, names[path]):
            copy(earlier, path.with_suffix(REFERENCE))
            context.note(
                f"log-probabilities of {path.stem} under the reference: those of {earlier.parts[-3]}"
            )
            missing.remove(path)
    total = sum(np.load(path, mmap_mode="r").shape[1] for path in missing)
    model = on_device(start) if missing else None
    for path in missing:
        assert model is not None
        found = row_nats(model, np.load(path), precision, tell)
        with atomic_path(path.with_suffix(REFERENCE)) as temporary, open(temporary, "wb") as file:
            np.save(file, found)
    for path in paths:
        copy(path.with_suffix(REFERENCE), out / KEPT / names[path])


def keys(start: Path, paths: Sequence[Path], precision: Precision) -> list[str]:
    """Name all that the nats of the rows in files follow from: the model, the rows, and what it is computed in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = {path.name: path for path in start.glob("model*") if path.is_file()}
    return [
        hashlib.sha256(
            f"{content_sha256(model)} {file_sha256(path)} {precision} {device}".encode()
        ).hexdigest()[:32]
        for path in paths
    ]


def sealed(out: Path, name: str) -> Path | None:
    """Find nats of this name in a finished step beside ``out``."""
    found = sorted(out.parent.glob(f"*/{KEPT}/{name}"))
    others = [path for path in found if path.parents[1] != out and path.parents[1].suffix != ".partial"]
    return next(iter(others), None)


def copy(source: Path, target: Path) -> None:
    """Copy a file, atomically."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def on_device(folder: Path) -> Transformer:
    """Load the model of a folder to where it is computed."""
    return load_model(folder).to("cuda" if torch.cuda.is_available() else "cpu")


def answer_nats(model: Transformer, conversations: Sequence[Conversation]) -> list[float]:
    """Return the nats of what counts in each conversation, in fp32, each in a row of its own."""
    room = max(one.length for one in conversations)
    rows_3RT = lay_out(conversations, [[number] for number in range(len(conversations))], room)
    nats_RT = row_nats(model, rows_3RT, "fp32", lambda _: None)
    return [float(nats_T.sum(dtype=np.float64)) for nats_T in nats_RT]
