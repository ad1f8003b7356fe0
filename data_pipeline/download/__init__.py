"""Stage ``download``: sources of text to document shards."""
