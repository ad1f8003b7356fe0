"""Machines that ranks run on: devices, nodes, their environment, and what is asked of Slurm."""
