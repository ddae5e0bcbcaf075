"""Fixtures of a small run, see ``tests/small_run.py``."""

from tests.small_run import corpus, saved_state, settings

__all__ = ["corpus", "saved_state", "settings"]
