"""Runs' folders of small models, to operate on."""

import pytest

from tests.small_parent import dense, drawn_state, write_parent
from tests.small_run import change_fixture, corpus, saved_state, settings, tokenizer

__all__ = ["change_fixture", "corpus", "saved_state", "settings", "tokenizer"]


@pytest.fixture(scope="session")
def dense_settings(settings):
    return dense(settings)


@pytest.fixture(scope="session")
def branches(dense_settings, tokenizer, tmp_path_factory):
    """Folders of two dense models of one shape."""
    folder = tmp_path_factory.mktemp("branches")
    return [
        write_parent(folder / name, dense_settings, tokenizer, drawn_state(dense_settings, seed))
        for seed, name in enumerate(("first", "second"))
    ]
