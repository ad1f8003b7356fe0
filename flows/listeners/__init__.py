"""Who is told of a run: the terminal, MLflow, the page of the flow run, receivers of notices."""
