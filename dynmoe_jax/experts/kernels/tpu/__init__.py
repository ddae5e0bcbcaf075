"""Kernels of the experts for TPUs."""
