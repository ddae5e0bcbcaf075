"""Every expert backend against the oracle: values and all gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dynmoe_jax import config
from dynmoe_jax.experts import (
    ExpertWeights,
    apply_experts,
    make_backend,
    rows_from_routing,
    saved_rows_per_token,
)
from dynmoe_jax.experts.kernels.cpu.native import native_experts
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.routing import TopK, TopP
from tests.close import assert_close

CPU = Target("cpu")
BACKENDS = {
    "capacity": make_backend(config.MoE(backend="capacity", capacity_factor=1e6)),
    "native": native_experts,
    "blocks": make_backend(config.MoE(grouped_product="blocks"), CPU),
    "ragged": make_backend(config.MoE(backend="grouped", grouped_product="xla"), CPU),
    "reference": make_backend(config.MoE(backend="reference")),
}
E, D, F = 4, 16, 24
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
)


def draw_weights(seed=0, dtype=jnp.float32):
    gate_up, down = jax.random.split(jax.random.key(seed))
    return ExpertWeights(
        (jax.random.normal(gate_up, (E, D, 2 * F)) / 4).astype(dtype),
        (jax.random.normal(down, (E, F, D)) / 5).astype(dtype),
    )


def draw_case(case, tokens, dtype=jnp.float32):
    """(x_TD, logits_TE, valid_T, router) of one named situation."""
    x_key, logit_key = jax.random.split(jax.random.key(1))
    x_TD = jax.random.normal(x_key, (tokens, D)).astype(dtype)
    logits_TE = jax.random.normal(logit_key, (tokens, E))
    valid_T = jnp.ones(tokens, bool)
    router = TopP(0.6)
    if case == "top_2":
        router = TopK(2)
    elif case == "empty_experts":
        logits_TE = logits_TE.at[:, 1].add(-50.0)
    elif case == "one_takes_all":
        logits_TE = logits_TE.at[:, 2].add(50.0)
    elif case == "zero_rows":
        valid_T = jnp.zeros(tokens, bool)
    elif case == "padding_tokens":
        valid_T = jnp.arange(tokens) % 3 > 0
        x_TD = jnp.where(valid_T[:, None], x_TD, jnp.nan)
    return x_TD, logits_TE, valid_T, router


def layer(backend, router, valid_T, poison=False):
    """(x, logits, weights) -> y, through routing and rows."""

    def run(x_TD, logits_TE, weights):
        rows = rows_from_routing(router.on_logits(logits_TE, valid_T))
        if poison:
            # What lies beyond the groups must not be read: a token that holds NaN, weight NaN.
            rows = dataclasses.replace(
                rows,
                token_R=jnp.where(rows.used_R, rows.token_R, 0),
                weight_R=jnp.where(rows.used_R, rows.weight_R, jnp.nan),
            )
        return backend(x_TD, rows, weights)

    return run


def value_and_gradients(run, x_TD, logits_TE, weights):
    mix_TD = jax.random.normal(jax.random.key(9), x_TD.shape)

    def loss(x_TD, logits_TE, weights):
        y_TD, dropped = run(x_TD, logits_TE, weights)
        return jnp.sum(y_TD.astype(jnp.float32) * mix_TD), (y_TD, dropped)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y_TD, dropped)), gradients = grad(x_TD, logits_TE, weights)
    return (y_TD, gradients), dropped


@functools.cache
def wanted_of(case, tokens):
    """The oracle's values and gradients, once for all backends."""
    x_TD, logits_TE, valid_T, router = draw_case(case, tokens)
    run = layer(reference_experts, router, valid_T)
    return value_and_gradients(run, x_TD, logits_TE, draw_weights())[0]


CASES = ["top_p", "top_2", "empty_experts", "one_takes_all", "zero_rows", "padding_tokens"]


@pytest.mark.parametrize(
    ("case", "tokens"), [("top_p", 1), ("top_p", 300), *((case, 37) for case in CASES[1:])]
)
@pytest.mark.parametrize("name", ["capacity", NATIVE, "blocks", "ragged"])
def test_backend_equals_reference(name, case, tokens):
    x_TD, logits_TE, valid_T, router = draw_case(case, tokens)
    actual, dropped = value_and_gradients(
        layer(BACKENDS[name], router, valid_T), x_TD, logits_TE, draw_weights()
    )
    assert dropped == 0
    assert_close(actual, wanted_of(case, tokens), 1e-5)


@pytest.mark.parametrize("name", ["capacity", "blocks", "ragged"])
def test_backend_equals_reference_in_bfloat16(name):
    x_TD, logits_TE, valid_T, router = draw_case("top_p", 300, jnp.bfloat16)
    wanted, _ = value_and_gradients(
        layer(reference_experts, router, valid_T),
        x_TD.astype(jnp.float32),
        logits_TE,
        jax.tree.map(lambda w: w.astype(jnp.float32), draw_weights(dtype=jnp.bfloat16)),
    )
    actual, _ = value_and_gradients(
        layer(BACKENDS[name], router, valid_T), x_TD, logits_TE, draw_weights(dtype=jnp.bfloat16)
    )
    assert_close(actual, wanted, 2e-2)


@pytest.mark.parametrize("name", ["capacity", NATIVE, "blocks", "ragged", "reference"])
def test_padding_rows_poisoned_with_nan_change_nothing(name):
    x_TD, logits_TE, valid_T, router = draw_case("padding_tokens", 90)
    weights = draw_weights()
    clean, _ = value_and_gradients(layer(BACKENDS[name], router, valid_T), x_TD, logits_TE, weights)
    poisoned, _ = value_and_gradients(
        layer(BACKENDS[name], router, valid_T, poison=True), x_TD, logits_TE, weights
    )
    assert not valid_T[0]
    assert np.all(np.isnan(x_TD[0]))
    assert_close(poisoned, clean, 1e-6)


def test_reference_equals_a_loop_over_tokens():
    x_TD, logits_TE, valid_T, router = draw_case("top_p", 11)
    weights = draw_weights()
    routing = router.on_logits(logits_TE, valid_T)
    y_TD, _ = reference_experts(x_TD, rows_from_routing(routing), weights)
    for t in range(11):
        y_D = np.zeros(D)
        for expert, weight in zip(routing.expert_TK[t], routing.weight_TK[t], strict=True):
            if expert < E:
                gate_D, up_D = np.split(x_TD[t] @ weights.gate_up_ED2F[expert], 2)
                hidden = gate_D / (1 + np.exp(-gate_D)) * up_D
                y_D += float(weight) * (hidden @ np.asarray(weights.down_EFD[expert]))
        np.testing.assert_allclose(y_TD[t], y_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [NATIVE, "blocks"])
def test_gradients_agree_with_finite_differences(name):
    x_TD, logits_TE, valid_T, router = draw_case("top_p", 9)
    weights = draw_weights()
    # The choice of experts is discrete; the logits' gradient is the oracle test's business.
    rows = rows_from_routing(router.on_logits(logits_TE, valid_T))

    def loss(x_TD, weight_R, weights):
        y_TD, _ = BACKENDS[name](x_TD, dataclasses.replace(rows, weight_R=weight_R), weights)
        return jnp.sum(jnp.sin(y_TD))

    check_grads(
        jax.jit(loss), (x_TD, rows.weight_R, weights), order=1, modes=["rev"], atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize(
    ("moe", "wanted"),
    [
        (config.MoE(router="top_k", top_k={"k": 8}), 8.0),
        (config.MoE(router="top_k", top_k={"k": 8}, saved_rows_per_token=0.0), 0.0),
        (config.MoE(router="top_p"), 2.0),
        (config.MoE(router="top_p", saved_rows_per_token=1.5), 1.5),
    ],
)
def test_rows_that_are_kept(moe, wanted):
    assert saved_rows_per_token(moe) == wanted


@pytest.mark.parametrize("saved", [config.AUTO, 0.0])
def test_top_k_is_one_part_on_accelerators(saved):
    """A loop over chunks of rows, each computed in turn, is for rows that are seldom there."""
    moe = config.MoE(
        num_experts=E,
        router="top_k",
        top_k={"k": E},
        grouped_product="xla",
        saved_rows_per_token=saved,
    )
    x_TD, logits_TE, valid_T, _ = draw_case("top_p", 32)
    run = layer(make_backend(moe, Target("tpu", "TPU v5")), TopK(E), valid_T)
    assert "while" not in str(jax.make_jaxpr(run)(x_TD, logits_TE, draw_weights()))


@pytest.mark.parametrize("saved", [0.0, 0.7])
@pytest.mark.parametrize("name", [NATIVE, "blocks"])
def test_recomputed_activations_equal_saved_ones(name, saved):
    x_TD, logits_TE, valid_T, router = draw_case("top_p", 60)
    moe = config.MoE(grouped_product=name, saved_rows_per_token=saved)
    backend = make_backend(moe, CPU)
    actual, _ = value_and_gradients(
        layer(backend, router, valid_T), x_TD, logits_TE, draw_weights()
    )
    assert_close(actual, wanted_of("top_p", 60), 1e-5)


@pytest.mark.parametrize("name", [NATIVE, "blocks"])
def test_backend_runs_inside_shard_map_scan_and_checkpoint(name):
    x_TD, logits_TE, valid_T, router = draw_case("top_p", 32)

    def two_layers(backend):
        def body(x_TD, _):
            routing = router.on_logits(logits_TE, valid_T)
            y_TD, _ = apply_experts(x_TD, routing, draw_weights(), backend)
            return x_TD + y_TD, None

        return lambda x_TD: jax.lax.scan(jax.checkpoint(body), x_TD, length=2)[0]

    def gradient(backend):
        return jax.jit(jax.grad(lambda x_TD: jnp.sum(jnp.sin(two_layers(backend)(x_TD)))))(x_TD)

    wanted = gradient(reference_experts)
    assert_close(gradient(BACKENDS[name]), wanted, 1e-5)
    with jax.set_mesh(make_mesh(config.Mesh(data=4), 4, jax.devices()[:4])):
        assert_close(gradient(BACKENDS[name]), wanted, 1e-5)


def test_capacity_drops_the_latest_rows_and_counts_them():
    # Six tokens, one expert each, all on expert 0; C = ceil(1.0 * 6 / 4) = 2 slots.
    x_TD = jax.random.normal(jax.random.key(0), (6, D))
    logits_TE = jnp.zeros((6, E)).at[:, 0].set(5.0)
    rows = rows_from_routing(TopK(1).on_logits(logits_TE, jnp.ones(6, bool)))
    backend = make_backend(config.MoE(backend="capacity", capacity_factor=1.0))
    y_TD, dropped = backend(x_TD, rows, draw_weights())
    exact_TD, _ = reference_experts(x_TD, rows, draw_weights())
    assert dropped == 4
    np.testing.assert_allclose(y_TD[:2], exact_TD[:2], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(y_TD[2:]) == 0)
