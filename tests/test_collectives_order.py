"""What devices say to each other, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dynmoe_jax.axes import MESH_AXES
from dynmoe_jax.collectives import gradients_together
from dynmoe_jax.model.remat import remat_policy
from dynmoe_jax.model.sharding import times_parameter


def mesh(data=1, expert=1, model=1):
    return jax.set_mesh(
        jax.make_mesh((1, data, expert, model), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))
    )


def together(x, weights):
    x, weights = gradients_together((x, weights))
    return jnp.sum(jnp.sin(x)) + jnp.sum(weights["a"] ** 3)


def test_gradients_go_on_together_on_a_mesh():
    x, weights = jnp.arange(4.0), {"a": jnp.ones(3)}
    gradient = jax.grad(together, argnums=(0, 1))
    assert "optimization_barrier" not in str(jax.make_jaxpr(gradient)(x, weights))
    with mesh(data=2):
        jaxpr = jax.make_jaxpr(gradient)(x, weights).jaxpr
        barriers = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
        assert [len(e.outvars) for e in barriers] == [2]
        dx, dweights = jax.jit(gradient)(x, weights)
    np.testing.assert_allclose(dx, np.cos(np.arange(4)), rtol=1e-6)
    np.testing.assert_allclose(dweights["a"], 3.0)


def test_backward_does_not_keep_what_goes_together(capsys):
    def loss(x, weights):
        return together(2 * x, weights)

    kept = jax.checkpoint(loss, policy=remat_policy("elementwise"))
    with mesh(data=2):
        jax.ad_checkpoint.print_saved_residuals(kept, jnp.arange(4.0), {"a": jnp.ones(3)})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("f32[4]")]
    assert lines == ["f32[4] from the argument x"]


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "expert": 2}, {"data": 2, "model": 2}], ids=str)
def test_a_product_with_a_parameter(sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    x_BLX = jax.random.normal(keys[0], (4, 3, 32))
    output_HWD = jax.random.normal(keys[1], (4, 8, 16))
    dy_BLD = jax.random.normal(keys[2], (4, 3, 16))

    @jax.jit
    def run(x_BLX, output_HWD, dy_BLD):
        def product(x_BLX, output_HWD):
            return times_parameter(x_BLX, "output_HWD", output_HWD)

        y_BLD, pull_back = jax.vjp(product, x_BLX, output_HWD)
        return y_BLD, *pull_back(dy_BLD)

    with mesh(**sizes):
        actual = run(x_BLX, output_HWD, dy_BLD)
        if "expert" in sizes:
            # Each device gets its piece of the sum, and nobody all of it.
            assert "reduce_scatter" in str(jax.make_jaxpr(run)(x_BLX, output_HWD, dy_BLD))
    wanted = (
        jnp.einsum("blhw,hwd->bld", x_BLX.reshape(4, 3, 4, 8), output_HWD),
        jnp.einsum("bld,hwd->blhw", dy_BLD, output_HWD).reshape(4, 3, 32),
        jnp.einsum("blhw,bld->hwd", x_BLX.reshape(4, 3, 4, 8), dy_BLD),
    )
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-4, atol=1e-4)
