"""The store, the plan, and processes: all that a run needs, without Prefect or MLflow."""
