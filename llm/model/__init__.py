"""The transformer, its config, its layouts in `transformers`, and text that it writes."""
