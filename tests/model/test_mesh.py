"""Eight devices with an eighth of the batch each compute what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax.routing.losses import balance_loss, entropy_loss

B, L = 8, 8
AXES = ("data", "expert", "model")
TOKENS = np.random.default_rng(0).integers(0, 32, (B, L))
# Every device has another number of valid tokens.
SEGMENTS = (np.arange(L) < np.arange(1, B + 1)[:, None]).astype(np.int32)


def compute(decoder, tokens_BL, segments_BL):
    """((loss, output), gradients), with routing losses in it: they are means over all devices."""

    def loss(decoder):
        output = decoder(tokens_BL, segments_BL)
        valid_BL1 = (segments_BL > 0)[..., None]
        loss = jnp.sum(jnp.where(valid_BL1, jnp.square(output.logits), 0)) / jnp.sum(valid_BL1)
        routing = output.routing
        for routing_loss in (balance_loss, entropy_loss):
            loss += jnp.sum(routing_loss(routing.by_layer, routing.valid_T))
        return loss, output

    return nnx.value_and_grad(loss, has_aux=True)(decoder)


def test_data_parallel(small, draw):
    decoder = draw(small(backend="grouped"))
    (loss, output), gradients = nnx.jit(compute)(decoder, TOKENS, SEGMENTS)

    mesh = jax.make_mesh((8, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, P("data"))
        tokens, segments = (jax.device_put(x, batch) for x in (TOKENS, SEGMENTS))
        replicated = jax.device_put(nnx.state(decoder), NamedSharding(mesh, P()))
        nnx.update(decoder, replicated)
        (loss_8, output_8), gradients_8 = nnx.jit(compute)(decoder, tokens, segments)

    assert len(output_8.logits.sharding.device_set) == 8
    assert not output_8.logits.sharding.is_fully_replicated
    np.testing.assert_allclose(loss_8, loss, rtol=1e-5)
    valid_BL = SEGMENTS > 0
    np.testing.assert_allclose(
        np.asarray(output_8.logits)[valid_BL],
        np.asarray(output.logits)[valid_BL],
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_array_equal(
        output_8.routing.experts_per_token, output.routing.experts_per_token
    )
    leaves = zip(gradients_8.flat_state(), gradients.flat_state(), strict=True)
    for (path, actual), (_, wanted) in leaves:
        error = np.linalg.norm(actual[...] - wanted[...]) / np.linalg.norm(wanted[...])
        assert error < 1e-5, (path, error)
