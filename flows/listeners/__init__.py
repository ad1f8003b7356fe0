"""Listeners to which a run is reported: the terminal, MLflow, the page of the flow run, receivers of notices."""
