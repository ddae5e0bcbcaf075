"""The kernels for CPUs against the oracle, at sizes that leave something over everywhere."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts import ExpertWeights, StackedView
from dynmoe_jax.experts.kernels.cpu import native
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.experts.rows import Slots, rows_from_slots
from dynmoe_jax.hardware.native import library
from tests.close import assert_close

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())


def draw(tokens, width, hidden_width, experts, slots, seed=0):
    """(x_TD, rows, weights); tokens choose 0 to ``slots`` of all experts but the last."""
    rng = np.random.default_rng(seed)
    expert_TK = np.argsort(rng.random((tokens, experts - 1)), axis=1)[:, :slots]
    used_TK = np.arange(slots) < rng.integers(0, slots + 1, (tokens, 1))
    weight_TK = np.where(used_TK, rng.random((tokens, slots)), 0)
    chosen = Slots(
        jnp.asarray(np.where(used_TK, expert_TK, experts), jnp.int32),
        jnp.asarray(weight_TK, jnp.float32),
        experts,
    )

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / shape[-2] ** 0.5, jnp.float32)

    weights = ExpertWeights(
        normal(experts, width, 2 * hidden_width), normal(experts, hidden_width, width)
    )
    return normal(tokens, width), rows_from_slots(chosen, tokens * slots), weights


def value_and_gradients(backend, x_TD, rows, weights):
    mix_TD = jax.random.normal(jax.random.key(0), x_TD.shape)

    def loss(x_TD, weight_R, weights):
        y_TD, _ = backend(x_TD, dataclasses.replace(rows, weight_R=weight_R), weights)
        return jnp.sum(mix_TD * y_TD), y_TD

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, y_TD), gradients = run(x_TD, rows.weight_R, weights)
    return y_TD, *jax.tree.leaves(gradients)


def assert_equal_to_reference(case, **settings):
    def backend(*arguments):
        return native.native_experts(*arguments, **settings)

    assert_close(value_and_gradients(backend, *case), value_and_gradients(reference_experts, *case))


@pytest.mark.parametrize("shape", [(5, 8, 8, 4, 2), (37, 24, 40, 5, 3), (300, 72, 200, 6, 4)])
@pytest.mark.parametrize("saved", [0.0, 0.3, 10.0])
def test_widths_of_all_kinds(shape, saved):
    assert_equal_to_reference(draw(*shape), saved_rows_per_token=saved)


@pytest.mark.parametrize(("width", "hidden_width"), [(1, 1), (33, 17), (300, 31), (31, 530)])
def test_widths_that_are_no_multiple_of_anything(width, hidden_width):
    # More columns than a piece of a product has, deeper than one, and less than a vector.
    assert_equal_to_reference(draw(90, width, hidden_width, 3, 2))


@pytest.mark.parametrize("tokens", [1, 3, 7, 8, 9, 15])
def test_a_few_rows_take_a_path_of_their_own(tokens):
    assert_equal_to_reference(draw(tokens, 21, 37, 2, 1, seed=tokens))


@pytest.mark.parametrize("wave", [1, 7, 50, 100])
@pytest.mark.parametrize("saved", [0.0, 0.7])
def test_experts_that_are_cut_into_waves(monkeypatch, wave, saved):
    # Experts of about 40 rows: some span waves, their weight gradients add up.
    monkeypatch.setattr(native, "WAVE_ROWS", wave)
    assert_equal_to_reference(draw(100, 12, 20, 4, 2), saved_rows_per_token=saved)


def test_large_activations():
    # The exponential is exact to rounding, and neither end of it overflows.
    x_TD, rows, weights = draw(40, 16, 24, 3, 2)
    assert_equal_to_reference((300 * x_TD, rows, weights))


def test_what_it_returns_does_not_depend_on_what_was_there():
    # Results lie in memory that others have left: here in what held NaN, in arrays of their sizes.
    case = draw(64, 24, 40, 5, 3)
    first = value_and_gradients(native.native_experts, *case)
    for _ in range(3):
        left = [jnp.full(array.shape, jnp.nan) for array in 50 * [*first]]
        jax.block_until_ready(left)
        del left
        again = value_and_gradients(native.native_experts, *case)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layer", [0, 2])
def test_experts_that_are_read_in_a_stack(layer):
    x_TD, rows, weights = draw(40, 24, 16, 4, 2)

    def stacked(array):
        # NaN wherever another layer lies.
        return jnp.full((3, *array.shape), jnp.nan).at[layer].set(array)

    place = StackedView(
        stacked(weights.gate_up_ED2F), stacked(weights.down_EFD), jnp.asarray(layer, jnp.int32)
    )

    def from_stack(x_TD, rows, weights):
        # What lies in the layer's own arrays is not read, but gradients are theirs.
        alone = jax.tree.map(lambda array: array + jnp.nan, weights)
        return native.native_experts(x_TD, rows, dataclasses.replace(alone, stacked=place))

    case = x_TD, rows, weights
    wanted = value_and_gradients(reference_experts, *case)
    assert_close(value_and_gradients(from_stack, *case), wanted)


ROOT = Path(__file__).parents[4]

# The more threads, the narrower the tasks.
THREADS = """
import hashlib, os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: int(sys.argv[1])])
from dynmoe_jax.experts.kernels.cpu.native import native_experts
from tests.experts.kernels.cpu.test_native import draw, value_and_gradients
results = value_and_gradients(native_experts, *draw(200, 640, 330, 3, 2))
print(hashlib.sha256(b"".join(map(bytes, map(memoryview, results)))).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no threads")
@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
def test_results_do_not_depend_on_the_number_of_threads():
    def bits(threads):
        command = [sys.executable, "-c", THREADS, str(threads)]
        # Eight devices would have eight threads, on however many cores.
        alone = os.environ | {"XLA_FLAGS": ""}
        run = subprocess.run(
            command, check=True, capture_output=True, text=True, env=alone, cwd=ROOT
        )
        return run.stdout.split()[-1]

    assert bits(1) == bits(2)
