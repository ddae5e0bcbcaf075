"""Fixtures of a small run, see ``tests/small_run.py``."""

from tests.small_run import corpus, settings

__all__ = ["corpus", "settings"]
