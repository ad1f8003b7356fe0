"""What the tokenizer's stages are made of: hashes of ids, encoders, and sorted runs of tokens on disk."""
