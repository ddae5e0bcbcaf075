"""Kernels of the experts for NVIDIA GPUs."""
