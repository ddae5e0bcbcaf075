"""Evaluation of ensembles on held-out text, by domain."""
