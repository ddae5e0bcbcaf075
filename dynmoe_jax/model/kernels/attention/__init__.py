"""Attention by platform: the choice, the interface, and the kernels."""
