"""Text to token shards: plain functions on folders, without torch, Prefect or MLflow."""
