"""Kernels for CPUs in C++, which XLA calls through its foreign function interface."""
