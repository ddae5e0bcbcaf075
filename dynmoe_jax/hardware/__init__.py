"""Devices: the target of a program, chips and their rates, pages of memory, C++ kernels."""
