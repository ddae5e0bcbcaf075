"""Grouped products against the einsum twin; the Megablox kernels in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts.kernels.contract import REFERENCE, XLA
from dynmoe_jax.experts.kernels.tpu.gmm import megablox_products

PRODUCTS = {"xla": XLA, "megablox": megablox_products(240.0, 2**26, interpret=True)}
GROUPS = {
    "uneven": [100, 0, 257, 30],
    "full": [128, 128, 128, 128],
    "one_takes_all": [0, 0, 512, 0],
    "last_empty": [200, 10, 1, 0],
    "no_rows": [0, 0, 0, 0],
}
R, E, INNER, OUTER = 512, 4, 24, 40


def draw(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(R, INNER), (E, INNER, OUTER), (R, OUTER)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


@pytest.fixture(scope="module")
def compiled():
    """All three products of an implementation, compiled once."""

    def all_three(products):
        def run(x_RI, w_EIO, dy_RO, group_size_E):
            return (
                products.forward(x_RI, w_EIO, group_size_E),
                products.input_gradient(dy_RO, w_EIO, group_size_E),
                products.weight_gradient(x_RI, dy_RO, group_size_E),
            )

        return jax.jit(run)

    return {name: all_three(products) for name, products in PRODUCTS.items()} | {
        "reference": all_three(REFERENCE)
    }


@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_products_equal_the_reference(compiled, name, groups):
    group_size_E = jnp.array(GROUPS[groups], jnp.int32)
    used = sum(GROUPS[groups])
    actual = compiled[name](*draw(), group_size_E)
    wanted = compiled["reference"](*draw(), group_size_E)
    for product, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert a.dtype == jnp.float32
        # Rows beyond the groups are the caller's to mask.
        a, w = (a, w) if product == 2 else (a[:used], w[:used])
        np.testing.assert_allclose(a, w, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_products_of_bfloat16_add_up_in_float32(compiled, name):
    group_size_E = jnp.array(GROUPS["uneven"], jnp.int32)
    used = sum(GROUPS["uneven"])
    x_RI, w_EIO, dy_RO = draw(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (x_RI, w_EIO, dy_RO)]
    actual = compiled[name](x_RI, w_EIO, dy_RO, group_size_E)
    wanted = compiled["reference"](*wide, group_size_E)
    for product, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert a.dtype == jnp.bfloat16
        a, w = (a, w) if product == 2 else (a[:used], w[:used])
        # One rounding to eight bits: sums in bfloat16 over 257 rows would be off by far more.
        error = np.abs(np.asarray(a, np.float32) - np.asarray(w))
        assert np.all(error <= 2**-8 * np.abs(w) + 1e-3)
