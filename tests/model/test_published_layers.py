"""Layers of published models, computed by loops in NumPy: all of it, and what each has of its own.

Switch, GShard, Mixtral, DeepSeekMoE, Qwen1.5-MoE and Skywork-MoE.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.inputs import TokenPositions

T, D, E, F = 12, 8, 4, 6
RANDOM = np.random.default_rng(3)
X_TD = RANDOM.normal(size=(T, D)).astype(np.float32)
ROUTER_DE = RANDOM.normal(size=(D, E)).astype(np.float32)
GATE_UP_ED2F = RANDOM.normal(scale=0.4, size=(E, D, 2 * F)).astype(np.float32)
DOWN_EFD = RANDOM.normal(scale=0.4, size=(E, F, D)).astype(np.float32)
POSITIONS = TokenPositions(np.ones((1, T), np.int32), None)


def layer_of(**moe):
    """A layer with the experts and the router above; what else it has is drawn."""
    moe = {"num_experts": E, "hidden_width": F, "router": "top_k"} | moe
    model = config.Model(
        width=D,
        num_heads=1,
        num_kv_heads=1,
        head_width=8,
        kernels="plain",
        dtype="float32",
        moe=config.MoE(**moe),
    )
    structure, shapes = nnx.split(nnx.eval_shape(lambda: MoEFeedForward(model, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    layer = nnx.merge(structure, jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(scale=0.4, size=leaf.shape), jnp.float32), shapes
    ))  # fmt: skip
    if moe["num_experts"] == E:
        layer.router_DE[...] = jnp.asarray(ROUTER_DE)
        layer.gate_up_ED2F[...], layer.down_EFD[...] = (
            jnp.asarray(GATE_UP_ED2F),
            jnp.asarray(DOWN_EFD),
        )
    return layer


@nnx.jit
def feed(layer, x_TD):
    """(y_TD, record) of a layer whose router projects the tokens themselves."""
    return layer(x_TD, x_TD @ layer.router_DE[...], POSITIONS)


def swiglu(x, gate_up, down):
    """One feed-forward, in float64; the first half of ``gate_up`` is the gate."""
    gate, up = np.split(np.float64(x) @ gate_up, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def softmax(z):
    exp = np.exp(np.float64(z) - np.max(z))
    return exp / exp.sum()


def test_mixtral_is_that_of_a_loop_and_drops_nobody():
    y_TD, record = feed(layer_of(top_k={"k": 2, "softmax": "after"}), X_TD)
    for token, x_D in enumerate(X_TD):
        z_E = x_D @ ROUTER_DE
        best = np.argsort(-z_E)[:2]
        weights = softmax(z_E[best])
        wanted_D = sum(
            weight * swiglu(x_D, GATE_UP_ED2F[e], DOWN_EFD[e])
            for e, weight in zip(best, weights, strict=True)
        )
        np.testing.assert_allclose(y_TD[token], wanted_D, rtol=1e-4, atol=1e-5)
    assert int(np.sum(record.kept_T)) == 2 * T
    assert int(record.dropped) == 0


def test_gshard_with_places_for_all_is_a_dense_mask():
    places = {"factor": float(E), "minimum": 1, "priority": "choice"}
    layer = layer_of(top_k={"k": 2, "renormalize": True}, transforms="capacity", capacity=places)
    y_TD, record = feed(layer, X_TD)
    probs_TE = np.stack([softmax(z) for z in X_TD @ ROUTER_DE])
    masked_TE = np.where(probs_TE >= np.sort(probs_TE)[:, -2:-1], probs_TE, 0.0)
    gates_TE = masked_TE / masked_TE.sum(axis=-1, keepdims=True)
    # Every expert computes every token.
    all_ETD = [swiglu(X_TD, *weights) for weights in zip(GATE_UP_ED2F, DOWN_EFD, strict=True)]
    np.testing.assert_allclose(
        y_TD, np.einsum("te,etd->td", gates_TE, np.stack(all_ETD)), rtol=1e-4, atol=1e-5
    )
    assert int(record.dropped) == 0


def test_tokens_that_switch_drops_leave_the_block_as_they_came():
    places = {"factor": 0.5, "minimum": 1, "priority": "token"}
    layer = layer_of(top_k={"k": 1}, transforms="capacity", capacity=places)
    norm = nnx.RMSNorm(D, rngs=nnx.Rngs(0))

    @nnx.jit
    def block(layer, norm, x_BLD):
        """(the stream behind the block, the slope of its sum by the router, the record)."""

        def summed(router_DE):
            other = nnx.clone(layer)
            other.router_DE[...] = router_DE
            out_BLD, record = other.added_to(x_BLD, norm, POSITIONS, None)
            return jnp.sum(jnp.square(out_BLD)), (out_BLD, record)

        slope_DE, (out_BLD, record) = jax.grad(summed, has_aux=True)(layer.router_DE[...])
        return out_BLD, slope_DE, record

    out_BLD, slope_DE, record = block(layer, norm, X_TD[None])
    normed_TD = X_TD / np.sqrt(np.mean(np.square(X_TD), axis=-1, keepdims=True) + 1e-6)
    expert_T = np.argmax(normed_TD @ ROUTER_DE, axis=-1)
    count_E = np.bincount(expert_T, minlength=E)
    C = math.ceil(0.5 * T / E)
    kept_T = np.array([np.sum(expert_T[:t] == e) < C for t, e in enumerate(expert_T)])
    np.testing.assert_array_equal(record.kept_T, kept_T)
    assert int(record.dropped) == np.sum(np.maximum(0, count_E - C)) > 0
    out_TD = np.asarray(out_BLD[0])
    np.testing.assert_array_equal(out_TD[~kept_T].view(np.int32), X_TD[~kept_T].view(np.int32))
    assert np.all(np.any(out_TD[kept_T] != X_TD[kept_T], axis=-1))
    # The router learns from the raw gate alone: with a gate of 1 this would be 0.
    assert np.max(np.abs(slope_DE)) > 1e-3


SHARED = {"shared_hidden_width": 2 * F, "top_k": {"k": 2}}


@dataclasses.dataclass(frozen=True)
class NoGates:
    """A router whose weights are all zero."""

    router: object

    def __getattr__(self, name):
        return getattr(self.router, name)

    def __call__(self, params, given):
        routing = self.router(params, given)
        return dataclasses.replace(routing, weight_TK=jnp.zeros_like(routing.weight_TK))


def shared_experts(layer, x_TD):
    """The sum of the two experts that a wide one consists of."""
    gate_DF, up_DF = np.split(np.asarray(layer.shared_gate_up_D2F[...]), 2, axis=-1)
    down_FD = np.asarray(layer.shared_down_FD[...])
    total_TD = 0.0
    for own in (slice(0, F), slice(F, 2 * F)):
        gate_up_D2F = np.concatenate([gate_DF[:, own], up_DF[:, own]], axis=-1)
        total_TD += swiglu(x_TD, gate_up_D2F, down_FD[own])
    return total_TD


def test_deepseek_moe_without_gates_is_the_sum_of_its_shared_experts():
    layer = layer_of(**SHARED)
    wanted_TD = shared_experts(layer, X_TD)
    layer.router = NoGates(layer.router)
    np.testing.assert_allclose(feed(layer, X_TD)[0], wanted_TD, rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(wanted_TD)) > 0.1


def test_deepseek_moe_cut_into_fragments_is_the_layer_that_was_not_cut():
    """With the parent's gate for all its fragments, and all fragments of those chosen."""
    m = 2
    whole = layer_of(top_k={"k": 2})
    # Fragments share a softmax's mass, so that each has an m-th of its parent's probability.
    cut = layer_of(num_experts=m * E, hidden_width=F // m, top_k={"k": 2 * m}, routed_scale=m)
    cut.router_DE[...] = jnp.repeat(jnp.asarray(ROUTER_DE), m, axis=1)
    gate_EDF, up_EDF = np.split(GATE_UP_ED2F, 2, axis=-1)
    part = F // m
    fragments = [
        (
            np.concatenate(
                [half[e][:, i * part : (i + 1) * part] for half in (gate_EDF, up_EDF)], -1
            ),
            DOWN_EFD[e, i * part : (i + 1) * part],
        )
        for e in range(E)
        for i in range(m)
    ]
    cut.gate_up_ED2F[...], cut.down_EFD[...] = (
        jnp.asarray(np.stack(matrices)) for matrices in zip(*fragments, strict=True)
    )
    wanted_TD, of_whole = feed(whole, X_TD)
    found_TD, of_cut = feed(cut, X_TD)
    parents_TK = np.sort(of_cut.routing.expert_TK // m, axis=-1)
    of_whole_TK = np.sort(of_whole.routing.expert_TK, axis=-1)
    np.testing.assert_array_equal(parents_TK, np.repeat(of_whole_TK, m, axis=-1))
    np.testing.assert_allclose(found_TD, wanted_TD, rtol=1e-4, atol=1e-5)


def test_qwen_moe_shared_gate_scales_the_shared_expert():
    layer = layer_of(shared_gate=True, **SHARED)
    x_TD = X_TD.copy()
    x_TD[:, 0] = 1.0  # a constant feature, which the gate reads alone
    shared_TD = shared_experts(layer, x_TD)
    found = {}
    for logit in (-30.0, 0.0, 30.0):
        layer.shared_router_D1[...] = jnp.zeros((D, 1)).at[0, 0].set(logit)
        found[logit], record = feed(layer, x_TD)
    routed_TD = np.zeros((T, D))
    for token, z_E in enumerate(x_TD @ ROUTER_DE):
        for e in np.argsort(-z_E)[:2]:
            weight = softmax(z_E)[e]
            routed_TD[token] += weight * swiglu(x_TD[token], GATE_UP_ED2F[e], DOWN_EFD[e])
    for logit, factor in ((-30.0, 0.0), (0.0, 0.5), (30.0, 1.0)):
        wanted_TD = routed_TD + factor * shared_TD
        np.testing.assert_allclose(found[logit], wanted_TD, rtol=1e-4, atol=1e-5)
    assert np.all(np.sum(record.routing.weight_TK, axis=-1) < 1)  # nothing is renormalized


def test_skywork_probabilities_do_not_know_the_scale_of_logits():
    layer = layer_of(top_k={"k": 2, "renormalize": True}, normalized_logits=1.0)
    run = nnx.jit(lambda layer, logits_TE: layer(X_TD, logits_TE, POSITIONS)[1].routing)
    logits_TE = X_TD @ ROUTER_DE
    first = run(layer, logits_TE)
    np.testing.assert_allclose(np.std(first.logits_TE, axis=-1), 1.0, rtol=1e-4)
    for factor, shift in ((0.1, 0.0), (7.0, 0.0), (3.0, -5.0)):
        other = run(layer, factor * logits_TE + shift)
        np.testing.assert_allclose(other.probs_TE, first.probs_TE, rtol=0, atol=1e-4)
        np.testing.assert_allclose(other.weight_TK, first.weight_TK, rtol=0, atol=1e-4)
        # Those of a plain softmax move.
        plain, scaled = (jax.nn.softmax(z) for z in (logits_TE, factor * logits_TE + shift))
        assert np.max(np.abs(plain - scaled)) > 0.1
