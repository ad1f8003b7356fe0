"""Comparisons with peers that anyone can run, one command each: ``python -m benchmarks.<name>``; see README.md."""
