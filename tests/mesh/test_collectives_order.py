"""What devices say to each other, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.mesh.collectives import each_device, gathered, gathered_by_expert
from dynmoe_jax.mesh.transfer_order import behind, gradients_together
from dynmoe_jax.model.linear.products import times_parameter
from dynmoe_jax.model.remat import remat_policy


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


def read_behind(x, others):
    """Reads x once others are there, which backward needs as well."""
    others = jnp.sin(others)
    return jnp.sum(jnp.sin(behind(x, others))) + jnp.sum(others**2)


def test_a_value_is_read_behind_others_on_a_mesh(capsys):
    x, others = jnp.arange(4.0), jnp.ones(3)
    gradient = jax.grad(read_behind, argnums=(0, 1))
    assert "optimization_barrier" not in str(jax.make_jaxpr(gradient)(x, others))
    with mesh(data=2):
        assert "optimization_barrier" in str(jax.make_jaxpr(gradient)(x, others))
        found = jax.jit(gradient)(x, others)
        kept = jax.checkpoint(read_behind, policy=remat_policy("elementwise"))
        again = jax.make_jaxpr(jax.grad(kept))(x, others)
        jax.ad_checkpoint.print_saved_residuals(kept, x, others)
    for actual, expected in zip(found, [np.cos(np.arange(4)), np.sin(2) * np.ones(3)], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    # Backward reads it behind them too, and keeps no copy.
    assert "optimization_barrier" in str(again).split("remat2", 1)[-1]
    kept = capsys.readouterr().out.splitlines()
    assert all("from the argument" in line for line in kept if line.startswith("f32")), kept


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_experts_put_together_by_rows_of_one(experts):
    """The order of a swap among all devices, and its way back."""
    keys = jax.random.split(jax.random.key(0), 2)
    down_EFD = jax.random.normal(keys[0], (experts, 24, 5))
    seen_SEFD = jax.random.normal(keys[1], (8, experts, 24, 5))
    spec = P(None, "data")

    def run(put_together):
        def on_each_device(part, seen_1EFD):
            whole_EFD = put_together(part)
            return whole_EFD[None], jnp.sum(whole_EFD * seen_1EFD[0], keepdims=True)[0]

        together = each_device(on_each_device, (spec, P("data")), (P("data"), P("data")))

        def weighed(down_EFD):
            whole_SEFD, sum_S = together(down_EFD, seen_SEFD)
            return jnp.sum(sum_S), whole_SEFD

        return jax.jit(jax.value_and_grad(weighed, has_aux=True))(down_EFD)

    with mesh(data=8):
        (_, whole_SEFD), gradient = run(lambda part: gathered_by_expert(part, ("data",)))
        (_, plain_SEFD), expected = run(lambda part: gathered(part, spec))
    np.testing.assert_array_equal(whole_SEFD, plain_SEFD)
    np.testing.assert_array_equal(whole_SEFD[3], down_EFD)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, seen_SEFD.sum(0), rtol=1e-5, atol=1e-6)


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
