"""Reads an exported folder with the `transformers` that is on the path, for `tests/llm/test_old_readers.py`.

python old_reader.py FOLDER TOKENS OUT       (TOKENS: JSON, rows of ids; OUT: JSON)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.inference_mode():
    logits = model(torch.tensor(json.loads(tokens))).logits
writer = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
prompts = ["def main(path):\n    return", "import"]
sampled = {"do_sample": False, "max_new_tokens": 4, "return_full_text": False}
found = {
    "version": transformers.__version__,
    "architecture": type(model).__name__,
    "logits": logits.tolist(),
    "together": [texts[0]["generated_text"] for texts in writer(prompts, **sampled)],
    "alone": [writer(prompt, **sampled)[0]["generated_text"] for prompt in prompts],
    "longest": len(tokenizer("x = 1\n" * 500, truncation=True)["input_ids"]),
    "padded": tokenizer(prompts, padding=True)["attention_mask"],
}
Path(out).write_text(json.dumps(found), encoding="utf-8")
