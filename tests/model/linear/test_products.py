"""Dense products by the kernels against XLA's, and when which of them multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.hardware.native import library
from dynmoe_jax.model.linear import products
from dynmoe_jax.model.linear.products import contracted, times
from tests.close import assert_close

needs_kernels = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())


@pytest.fixture
def matrix_unit(monkeypatch):
    """As on a CPU that has one; the kernels compute the same by vectors where there is none."""
    monkeypatch.setattr(library, "has_matrix_unit", lambda: True)


def draw(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def calls_kernels(function, *arguments):
    return "ffi_call" in str(jax.make_jaxpr(function)(*arguments))


@needs_kernels
@pytest.mark.parametrize("shape", [(513, 33, 70), (1030, 520, 257)])
def test_a_product_and_its_gradients(matrix_unit, shape):
    rows, width, columns = shape
    x_BLD, matrix_DY, mix_BLY = draw(1, rows, width), draw(width, columns), draw(1, rows, columns)

    def value_and_gradients(product):
        def loss(x_BLD, matrix_DY):
            y_BLY = product(x_BLD, matrix_DY)
            return jnp.vdot(mix_BLY, y_BLY), y_BLY

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y_BLY), gradients = run(x_BLD, matrix_DY)
        return y_BLY, *gradients

    assert calls_kernels(times, x_BLD, matrix_DY)
    assert_close(value_and_gradients(times), value_and_gradients(jnp.matmul))


@needs_kernels
@pytest.mark.parametrize(
    ("left", "right", "left_axes", "right_axes"),
    [
        ((3, 200, 40), (40, 65), (2,), (0,)),
        ((3, 200, 40), (65, 40), (2,), (1,)),
        ((3, 50, 600), (3, 50, 65), (0, 1), (0, 1)),
    ],
)
def test_sides_that_lie_in_all_ways(matrix_unit, left, right, left_axes, right_axes):
    arguments = draw(*left), draw(*right)

    def by_kernels(left, right):
        return contracted(left, right, left_axes, right_axes)

    assert calls_kernels(by_kernels, *arguments)
    assert_close(by_kernels(*arguments), jnp.tensordot(*arguments, (left_axes, right_axes)))


def test_xla_multiplies_where_there_is_no_matrix_unit(monkeypatch):
    monkeypatch.setattr(library, "has_matrix_unit", lambda: False)
    assert not calls_kernels(times, draw(600, 8), draw(8, 8))


def test_xla_multiplies_few_rows_and_other_types(matrix_unit):
    assert not calls_kernels(times, draw(products.ROWS - 1, 8), draw(8, 8))
    assert not calls_kernels(times, draw(600, 8).astype(jnp.bfloat16), draw(8, 8))


def test_xla_multiplies_on_a_mesh(matrix_unit):
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert not calls_kernels(times, draw(600, 8), draw(8, 8))
