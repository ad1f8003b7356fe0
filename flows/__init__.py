"""The only room that knows Prefect and MLflow: store, stages, pipeline, tracking, command line."""
