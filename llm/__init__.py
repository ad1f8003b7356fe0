"""Token shards to a model: plain functions on folders, without Prefect or MLflow."""
