"""How fast we train, measured (``python -m benchmarks.training``): our trainer beside the loop that anyone would write,
plain PyTorch around `transformers`' Llama of the same shape. Every run of a contestant is a fresh process that probes
the machine's matrix products, trains some steps on random tokens and tells the median; contestants take turns, because
machines drift, and what binds are the ratios of medians within a round. In the same way our trainer races against
itself with compiled layers and at each ZeRO stage, and attention's back ends against each other.

Utilisation is model FLOPs a second as a part of the probed rate: 6 operations a matrix parameter and token, the
embedding's lookup not counted, and 6 T D a layer for causal attention over a context of T (`ModelConfig
.flops_per_token`; Chowdhery et al. 2022, arXiv:2204.02311, appendix B). What is recomputed does not count.
"""
