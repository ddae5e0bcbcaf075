"""Routers in which experts choose, and soft ones: what their layer computes, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import TopK
from dynmoe_jax.routing.routers import ExpertChoice

B, L, D, E, F, C = 8, 6, 8, 4, 8, 2


KINDS = {
    "expert_choice": {"expert_choice": {"experts_per_token": C * E / L}},
    "soft": {"soft": {"slots": 1}},
}


@pytest.fixture(params=KINDS)
def model(request):
    return model_of(request.param, **KINDS[request.param])


def model_of(router, **settings):
    moe = config.MoE(
        router=router, num_experts=E, hidden_width=F, allow_non_causal=True, **settings
    )
    return config.Model(num_layers=1, width=D, init_std=0.5, moe=moe)


def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    segments_BL = (jnp.arange(L) < jnp.array([6, 6, 4, 6, 3, 6, 6, 0])[:, None]).astype(jnp.int32)
    x_TD = jax.random.normal(keys[0], (B * L, D))
    logits_TE = 2 * jax.random.normal(keys[1], (B * L, E))
    x_TD = jnp.where(segments_BL.reshape(-1, 1) > 0, x_TD, jnp.nan)
    return x_TD, logits_TE, TokenPositions(segments_BL, jnp.zeros((B, L, D)))


def silu_expert(layer, e, x_RD):
    gate_R, up_R = jnp.split(x_RD @ layer.gate_up_ED2F[...][e], 2, axis=-1)
    return (jax.nn.silu(gate_R) * up_R) @ layer.down_EFD[...][e]


def wanted(layer, x_TD, logits_TE, positions):
    """Sequence by sequence, expert by expert, in plain Python."""
    valid_BL = np.asarray(positions.segment_ids_BL) > 0
    y_BLD = np.zeros((B, L, D), np.float32)
    probs_BLE = np.asarray(jax.nn.softmax(logits_TE)).reshape(B, L, E)
    logits_BLE, x_BLD = np.asarray(logits_TE).reshape(B, L, E), np.asarray(x_TD).reshape(B, L, D)
    for b in range(B):
        there = np.flatnonzero(valid_BL[b])
        for e in range(E):
            if not len(there):
                continue
            if isinstance(layer.router, ExpertChoice):
                capacity = max(1, len(there) * C // L)
                for t in there[np.argsort(-probs_BLE[b, there, e])][:capacity]:
                    y = silu_expert(layer, e, x_BLD[b, t : t + 1])[0]
                    y_BLD[b, t] += probs_BLE[b, t, e] * y
            else:
                share = np.exp(logits_BLE[b, there, e])
                mixed = (share / share.sum()) @ x_BLD[b, there]
                y = silu_expert(layer, e, mixed[None])[0]
                y_BLD[b, there] += probs_BLE[b, there, e][:, None] * np.asarray(y)
    return y_BLD.reshape(-1, D)


def test_the_layer_is_that_of_plain_python(model):
    layer, arguments = MoEFeedForward(model, rngs=nnx.Rngs(0)), inputs()
    y_TD, record = layer(*arguments)
    valid_T = np.asarray(arguments[2].segment_ids_BL).reshape(-1) > 0
    np.testing.assert_allclose(np.asarray(y_TD)[valid_T], wanted(layer, *arguments)[valid_T],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert int(record.dropped) == 0


def test_gradients_and_eight_devices(model):
    layer, (x_TD, logits_TE, positions) = MoEFeedForward(model, rngs=nnx.Rngs(0)), inputs()
    structure, params = nnx.split(layer)

    def loss(params, logits_TE):
        y_TD, _ = nnx.merge(structure, params)(x_TD, logits_TE, positions)
        valid_T1 = positions.segment_ids_BL.reshape(-1, 1) > 0
        return jnp.sum(jnp.where(valid_T1, y_TD, 0.0) ** 2)

    compute = jax.value_and_grad(loss, argnums=(0, 1))
    alone = jax.jit(compute)(params, logits_TE)
    along_TE = jax.random.normal(jax.random.key(3), logits_TE.shape)
    ends = [jax.jit(loss)(params, logits_TE + s * 1e-2 * along_TE) for s in (1, -1)]
    slope = float(jnp.sum(alone[1][1] * along_TE))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-2, rtol=2e-2)
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), B)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(params, mesh))
        eight = jax.jit(compute)(params, jax.device_put(logits_TE, batch_sharding(mesh)))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_slots_of_all_devices_need_not_divide_among_them():
    layer = MoEFeedForward(model_of("soft", soft={"group": "batch"}), rngs=nnx.Rngs(0))
    structure, params = nnx.split(layer)
    x_TD, logits_TE, positions = inputs()

    def compute(params, logits_TE):
        return nnx.merge(structure, params)(x_TD, logits_TE, positions)[0]

    alone = jax.jit(compute)(params, logits_TE)
    mesh = make_mesh(config.Mesh(data=8), B)
    with jax.set_mesh(mesh):
        eight = jax.jit(compute)(
            jax.device_put(params, state_shardings(params, mesh)),
            jax.device_put(logits_TE, batch_sharding(mesh)),
        )
    np.testing.assert_allclose(alone, eight, rtol=1e-4, atol=1e-5)


def test_a_decoder_tells_the_routing_of_either_kind(model):
    small = dataclasses.replace(
        model, num_heads=1, num_kv_heads=1, head_width=8, vocab_size=16, max_seq_len=L
    )
    decoder = Decoder(small, rngs=nnx.Rngs(0))
    routing = decoder(jnp.zeros((2, L), jnp.int32)).routing
    experts_NBL = np.asarray(routing.experts_per_token)
    wanted = C * E / L if "choice" in model.moe.router else E
    np.testing.assert_allclose(experts_NBL.mean(), wanted)


@dataclasses.dataclass(frozen=True)
class Identity(TopK):
    """Top-k whose experts share the output with the token itself."""

    def __call__(self, params, given):
        """Routes T tokens."""
        routing = super().__call__(params, given)
        return dataclasses.replace(routing, free_T=jnp.where(given.valid_T, 0.5, 0.0))


def test_what_is_free_is_added():
    x_TD, logits_TE, positions = inputs()
    outputs = []
    for kind in (TopK, Identity):
        with ROUTERS.temporarily("toy", kind):
            moe = config.MoE(router="toy", num_experts=E, hidden_width=F)
            layer = MoEFeedForward(config.Model(width=D, moe=moe), rngs=nnx.Rngs(0))
            outputs.append(layer(x_TD, logits_TE, positions)[0])
    valid_T = np.asarray(positions.segment_ids_BL).reshape(-1) > 0
    np.testing.assert_allclose((outputs[1] - outputs[0])[valid_T], 0.5 * x_TD[valid_T], rtol=1e-5)
    assert np.all(np.isfinite(outputs[1]))


def test_a_router_that_reads_what_nothing_makes_is_refused():
    class Curious(TopK):
        reads = frozenset({"the_future"})

    with (
        ROUTERS.temporarily("toy", dataclasses.dataclass(frozen=True)(Curious)),
        pytest.raises(config.ConfigError, match="reads the_future, which nothing makes"),
    ):
        MoEFeedForward(config.Model(moe=config.MoE(router="toy")), rngs=nnx.Rngs(0))
