"""What a comparison takes for the making of a model."""

from __future__ import annotations

from pathlib import Path

from flows.compare.subjects import Finder
from flows.engine.store import Artifact, Store


def seal(store: Store, stage: str, name: str, **inputs: Artifact) -> Artifact:
    store.begin(stage, name, {})
    recorded = {
        type_: {"stage": one.stage, "fingerprint": one.fingerprint, "payload_sha256": one.payload_sha256}
        for type_, one in inputs.items()
    }
    manifest = {"config": {}, "inputs": recorded, "metrics": {}, "finished": "2026-01-01"}
    return store.seal(stage, name, manifest)


def test_a_model_has_the_data_that_it_was_trained_on_whatever_it_is_evaluated_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ours, others = (seal(store, "dedup", name) for name in ("0a", "0b"))
    tokenizer = seal(store, "train_tokenizer", "0c", documents=others)
    trained_on, evaluated_on = (
        seal(store, "tokenize", name, documents=documents, tokenizer=tokenizer)
        for name, documents in (("0d", ours), ("0e", others))
    )
    model = seal(store, "pretrain", "0f", tokens=trained_on, tokenizer=tokenizer)
    scores = seal(store, "evaluate", "10", model=model, tokenizer=tokenizer, tokens=evaluated_on)
    subject = Finder(store)._of_artifact(scores, "A", "scores")
    assert subject.artifacts["tokenize"].fingerprint == "0d"
    assert subject.artifacts["dedup"].fingerprint == "0a"
    assert subject.made.fingerprint == "0f"
