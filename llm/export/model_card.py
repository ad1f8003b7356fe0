"""The model card: what a person who finds the exported folder must know, taken from the stages' manifests. It holds
no time, host or path, so the same line gives the same card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.core.text import human_bytes, table
from data_pipeline.stage import Metrics
from llm.model.config import ModelConfig
from llm.model.layouts import Layout, layout_of

LAYOUTS: dict[Layout, str] = {
    "llama": "Llama (rotary positions, RMSNorm)",
    "qwen3": "Qwen3 (Llama's, with a norm on queries and keys)",
    "gpt2": "GPT-2 (learned positions, LayerNorm, biases)",
}

SPECIAL_TOKENS = (
    "In training, a text that spells a special token (`{end}`) was read as these characters, and the token "
    "itself stood at the end of each document only. "
)
SPLIT = (
    "The tokenizer does the same: `tokenizer(text)` never yields a "
    "special token. Append `tokenizer.eos_token_id` to end a document; `tokenizer(text, split_special_tokens=False)` "
    "reads special tokens out of a text. The `tokenizers` library does so unless it is told otherwise: set "
    "`encode_special_tokens = True` on what it loads from `tokenizer.json`."
)
READ = (
    "That holds for what llmill read; the tokenizer was made elsewhere and reads special tokens out of a text, as chat "
    "templates need, unless it is told otherwise: `tokenizer(text, split_special_tokens=True)`."
)
READ_FOR_CHAT = (
    "The tokenizer reads special tokens out of a text, as its chat template needs: encode what people write with "
    "`tokenizer(text, split_special_tokens=True)`."
)
TRAINED = (
    "A decoder-only language model with {parameters:,.0f} parameters, trained from raw text by "
    "llmill. It continues text; it was not taught to follow instructions, and it repeats what its training "
    "text holds, errors and biases included."
)
FINETUNED = (
    "A decoder-only language model with {parameters:,.0f} parameters, trained on conversations by llmill: "
    "`tokenizer.apply_chat_template` writes them as it read them. It answers as its training text does, errors and "
    "biases included."
)
ALIGNED = (
    "A decoder-only language model with {parameters:,.0f} parameters, trained by llmill on pairs of answers of which "
    "people prefer one: `tokenizer.apply_chat_template` writes conversations as it read them. It answers as those "
    "pairs and its earlier training text do, errors and biases included."
)
CLASSIFIES = (
    "A transformer with {parameters:,.0f} parameters that gives a text one of the labels of its config, or several, "
    "trained by llmill. It reads them at the text's last token; of texts unlike those that it was trained on it may "
    "say anything, with confidence."
)
ADOPTED = (
    "A decoder-only language model with {parameters:,.0f} parameters. It was made elsewhere (see below) and exported "
    "by llmill as it is; it repeats what its training text held, errors and biases included."
)

Manifests = Mapping[str, Mapping[str, Any]]
"""Manifests by the names of steps, and of the inputs by type too."""
ABOUT = {"adopt": ADOPTED, "finetune": FINETUNED, "align": ALIGNED, "classify": CLASSIFIES}
"""Stage that made the model -> what the card says of it."""
TUNED = ("finetune", "align", "classify")
"""Stages that train a model further, on files of their own."""
INPUTS = ("model", "tokenizer", "scores")


def about_tokens(end: str, config: Mapping[str, Any]) -> str:
    """Return how special tokens are read, by a tokenizer with this ``tokenizer_config.json``."""
    split = config.get("split_special_tokens")
    return SPECIAL_TOKENS.format(end=end) + (SPLIT if split else READ if split is None else READ_FOR_CHAT)


def model_card(
    name: str, model: ModelConfig, manifests: Manifests, metrics: Metrics, special_tokens: str
) -> str:
    """Return ``README.md`` of an exported model, in Markdown with the front matter that model hubs read."""
    about = ABOUT.get(manifests.get("model", {}).get("stage", ""), TRAINED)
    task, loaded = "text-generation", "AutoModelForCausalLM"
    if model.labels:
        task, loaded = "text-classification", "AutoModelForSequenceClassification"
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---",
        f"# {name}",
        about.format(parameters=metrics["parameters"]),
        f"```python\nfrom transformers import {loaded}, AutoTokenizer\n\n"
        f'model, tokenizer = {loaded}.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n```',
        special_tokens,
        *adoptions(manifests),
        "## Architecture",
        architecture(model),
        "## How good it is",
        classified(manifests.get("model", {})) if model.labels else scores(evaluation(manifests)),
        "## Training text",
        sources(of_stage(manifests, "download")),
        *tunings(manifests),
        "## How it was made",
        lineage(manifests),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def architecture(model: ModelConfig) -> str:
    """Return the shape as a table."""
    layout = layout_of(model)
    heads = f"{model.heads}, {model.kv_head_count} of keys and values"
    rows = [
        ("layout", LAYOUTS[layout]),
        ("layers", model.layers),
        ("width", model.width),
        (f"hidden width ({'GELU' if layout == 'gpt2' else 'SwiGLU'})", model.hidden_width),
        ("heads", heads),
        ("context", f"{model.context} tokens"),
        ("vocabulary", f"{model.vocab_size} (byte-level BPE)"),
        ("embeddings", "tied to the head" if model.tie_embeddings else "apart from the head"),
    ]
    return table(("", ""), rows)


def adoptions(manifests: Manifests) -> list[str]:
    """List what was made elsewhere: where it comes from, its licence, and the hash of its content; often nothing."""
    found = {one["fingerprint"]: one for one in manifests.values() if one.get("stage") == "adopt"}
    rows = []
    for manifest in found.values():
        config = manifest["config"]
        where = " ".join(filter(None, [config.get("hub"), config.get("revision")]))
        stated = "; ".join(filter(None, [config.get("origin"), where])) or "not stated"
        content = config.get("content_sha256")
        hashed = f"`{content}`" if content else "that of the revision"
        rows.append((config["type"], stated, config.get("license") or "not stated", hashed))
    return ["## Made from", table(("", "origin", "licence", "SHA-256 of the content"), rows)] if rows else []


def tunings(manifests: Manifests) -> list[str]:
    """List the files of conversations, preferences or labelled texts that the model was trained on; often nothing."""
    found = {one["fingerprint"]: one for one in manifests.values() if one.get("stage") in TUNED}
    rows = [
        (
            manifest["stage"],
            one["name"],
            one.get("origin") or "not stated",
            one.get("license") or "not stated",
            f"`{one['path']}`",
        )
        for manifest in found.values()
        for one in manifest["config"]["data"]
    ]
    titles = ("stage", "file", "origin", "licence", "SHA-256")
    return ["## Trained further on", table(titles, rows)] if rows else []


def scores(manifest: Mapping[str, Any]) -> str:
    """Return the metrics of the evaluate stage, in Markdown."""
    if not manifest:
        return "Not evaluated."
    rows = [(metric, number(value)) for metric, value in manifest["metrics"].items()]
    return "On held-out documents of the same sources:\n\n" + table(("metric", "value"), rows)


def evaluation(manifests: Manifests) -> Mapping[str, Any]:
    """Return the manifest of the step that scored the model; an empty one where none did."""
    return manifests.get("scores") or of_stage(manifests, "evaluate")


def classified(manifest: Mapping[str, Any]) -> str:
    """Return the measures of a classifier on held-out texts, with their 95% intervals."""
    metrics = manifest.get("metrics", {})
    rows = [
        (name, number(value), f"{number(metrics[f'{name}_low'])} to {number(metrics[f'{name}_high'])}")
        for name, value in metrics.items()
        if f"{name}_low" in metrics
    ]
    return "On held-out texts of the same files:\n\n" + table(("measure", "value", "95% interval"), rows)


def sources(manifest: Mapping[str, Any]) -> str:
    """List where the text came from, as the download stage resolved it."""
    if not manifest:
        return "Unknown."
    rows = [
        (
            source["name"],
            source["kind"],
            origin(source),
            source.get("license") or "not stated",
            f"{source['files']:,}",
            human_bytes(source["bytes"]) if source["bytes"] else "unknown",
        )
        for source in manifest["config"]["sources"]
    ]
    return table(("source", "kind", "from", "licence", "files", "size"), rows)


def origin(source: Mapping[str, Any]) -> str:
    """Return where a person finds the text of a source: data set and commit, addresses, or the page about it."""
    found: list[str] = []
    if source.get("dataset"):  # elsewhere, `split` sets how files are cut into documents
        found = [source["dataset"]]
        found += [f"{key} {source[key]}" for key in ("config", "split", "revision") if source.get(key)]
    found += source.get("urls", ())
    found += [source["url"]] if source.get("url") else []
    return ", ".join(found)


def of_stage(manifests: Manifests, stage: str) -> Mapping[str, Any]:
    """Return the manifest of a step of this stage; an empty one where there is none."""
    return next((one for one in manifests.values() if one.get("stage") == stage), {})


def lineage(manifests: Manifests) -> str:
    """Return each step's fingerprint and metrics: enough to find the artifacts, or make them again."""
    rows = []
    for step, manifest in manifests.items():
        if step in INPUTS:
            continue  # it stands there under the name of its step too
        found = ", ".join(f"{metric} {number(value)}" for metric, value in manifest["metrics"].items())
        rows.append((step, f"`{manifest['fingerprint'][:12]}`", found))
    return table(("stage", "fingerprint", "figures"), rows)


def number(value: float) -> str:
    """Format a count without decimals, anything else with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
