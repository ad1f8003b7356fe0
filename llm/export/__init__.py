"""Stage ``export``: a folder that `transformers` loads."""
