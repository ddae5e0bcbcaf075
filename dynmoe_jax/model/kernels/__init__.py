"""Kernels of the decoder's dense parts, each with its twin in JAX."""
