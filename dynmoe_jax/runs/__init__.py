"""Folder of a run: checkpoints, records, summary, lock, and how a model is loaded from it."""
