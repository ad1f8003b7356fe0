"""Kernels that are fused, or special to a device: attention back ends, the loss, passes on a CPU, matrix products."""
