"""The commands of ``llmill``. What is heavy (torch, Prefect, MLflow) is imported by the command that needs it."""
