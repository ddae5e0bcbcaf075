"""Grouped matmul and SwiGLU: the choice of kernels, their contract, their twins."""
