"""Stage ``classify``: texts with labels, and a model that gives others theirs."""
