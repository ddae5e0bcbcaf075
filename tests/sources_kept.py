"""Fixture for tests of compiled programs that name the lines they come from."""

import jax
import pytest

FRAMES = 100
"""JAX's own default; other tests lower sooner without (``tests/conftest.py``)."""


@pytest.fixture(scope="package", autouse=True)
def sources_kept():
    """Keeps in programs where their operations were written."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", FRAMES)
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)
