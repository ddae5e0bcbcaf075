"""Mixture-of-Experts language models in which every token chooses how many experts it uses."""

__version__ = "0.1.0"
