"""Stage ``tokenize``: documents to token shards."""
