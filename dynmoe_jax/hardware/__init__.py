"""Devices: target, chips and their rates, memory budget and tiles of kernels, C++ kernels."""
