"""Stage ``clean``: documents that the rules keep."""
