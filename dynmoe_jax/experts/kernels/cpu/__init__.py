"""Kernels of the experts for CPUs."""
