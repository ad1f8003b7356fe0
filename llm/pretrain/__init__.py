"""Stage ``pretrain``: token shards to a trained model."""
