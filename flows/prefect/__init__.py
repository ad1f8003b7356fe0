"""Prefect around a run: flows, deployments, work pools, workers and the servers of `llmill up`."""
