"""Modules that a pool's processes begin with: those of the stages, and the signature kernels.

The fork server imports this once, so that its processes share the imports (0.6 s a stage) and the kernels that numba
reads from its cache on disk, instead of each doing so again. What stands here must bear forking: Arrow and
OpenBLAS do.
"""

import gigatoken  # noqa: F401
import pyarrow as pa

import data_pipeline.clean.stage
import data_pipeline.dedup.stage
import data_pipeline.download.stage
import data_pipeline.tokenize.stage  # noqa: F401
from data_pipeline.dedup.minhash import band_hashes, shingle_sets, signatures

TEXTS = pa.array(["a b c"])
band_hashes(signatures(TEXTS, permutations=2, ngram=1, seed=0, signs="symbols"), bands=1, rows=2)
shingle_sets(TEXTS, ngram=1, seed=0, signs="symbols")
