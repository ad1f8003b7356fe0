"""Layers compiled by torch.compile (Ansel et al. 2024, doi:10.1145/3620665.3640366): one by one, so that all share the
code of one and parameters keep their names. What is compiled fuses the elementwise work between the matrix products;
attention and the loss stay as they are, kernels of their own. Products in what is compiled are torch's.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Literal

import torch

from llm.kernels.attention import installed
from llm.model.transformer import Transformer


def compile_layers(model: Transformer, backend: str = "inductor") -> None:
    """Have each layer compiled, for the shapes that come, when it is first called."""
    # Not traced: back ends open packages and make what they keep of documents once for all layers.
    model.attend = torch.compiler.disable(model.attend)
    for layer in model.layers:
        layer.compile(backend=backend, dynamic=False)


def missing(device: Literal["cpu", "cuda"]) -> str | None:
    """Return what torch.compile lacks to run here, or None."""
    if device == "cuda" and not installed("triton"):
        return "the package triton is not installed"
    variable, known = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", (cpp_compiler(),))
    wanted = (os.environ[variable],) if os.environ.get(variable) else known
    if not any(map(shutil.which, wanted)):
        return f"there is no compiler {' or '.join(wanted)}"
    return None


def cpp_compiler() -> str:
    """Return the compiler that torch uses for C++ unless ``CXX`` names another."""
    return "clang++" if sys.platform == "darwin" else "g++"
