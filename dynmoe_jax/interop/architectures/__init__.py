"""Architectures: a table of names and layouts for each kind of model."""
