"""Compile time must not grow with depth; what XLA has to optimise stands in for it.

``python -m benchmarks.compile_time`` measures the time itself.
"""

from pathlib import Path

import pytest


@pytest.mark.slow
def test_program_of_24_layers_is_hardly_larger_than_that_of_2(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.compile_time import compile_step, instructions

    # The reference backend compiles fastest, and says as much about the layers around it.
    shallow, deep = (instructions(compile_step(layers, "reference")) for layers in (2, 24))
    assert shallow > 100  # it counts something
    assert deep <= 1.1 * shallow
