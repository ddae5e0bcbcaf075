"""Fixtures of a small run, see ``tests/small_run.py``."""

from tests.small_run import (
    change_fixture,
    corpus,
    saved_state,
    settings,
    state,
    tokenizer,
    workdir,
)

__all__ = [
    "change_fixture",
    "corpus",
    "saved_state",
    "settings",
    "state",
    "tokenizer",
    "workdir",
]
