"""MLflow, and nothing but it: no other module imports ``mlflow``."""
