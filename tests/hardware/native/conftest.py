import pytest

from dynmoe_jax.hardware.native import library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The library as if nothing had been compiled yet; what was asked before is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    functions = library.load, library.why_not, library.available
    for function in functions:
        function.cache_clear()
    yield library
    for function in functions:
        function.cache_clear()
