"""Ensembles of models with one tokenizer, weighed token by token (Branch-Train-Merge)."""
