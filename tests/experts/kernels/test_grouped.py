"""The layer of grouped products: kernels that leave garbage, parts, slots, meshes."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dynmoe_jax import config
from dynmoe_jax.experts import ExpertWeights, Rows, apply_experts, rows_from_routing
from dynmoe_jax.experts.kernels.contract import REFERENCE, XLA
from dynmoe_jax.experts.kernels.grouped import PartBounds, part_bounds, ragged_experts
from dynmoe_jax.experts.kernels.tpu.gmm import megablox_products
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.routing import TopK, TopP
from tests.close import assert_close
from tests.experts.budgeted import rows_within

E, D, F = 4, 16, 24


def draw(tokens=37, dtype=jnp.float32, D=D, F=F):
    """(x_TD, logits_TE, weights); expert 1 is never chosen."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_TD = jax.random.normal(keys[0], (tokens, D)).astype(dtype)
    logits_TE = jax.random.normal(keys[1], (tokens, E)).at[:, 1].add(-50.0)
    gate_up_ED2F = (jax.random.normal(keys[2], (E, D, 2 * F)) / 4).astype(dtype)
    down_EFD = (jax.random.normal(keys[3], (E, F, D)) / 5).astype(dtype)
    return x_TD, logits_TE, ExpertWeights(gate_up_ED2F, down_EFD)


def poisoned(products):
    """Kernels at their worst: NaN wherever nothing is promised."""

    def beyond(y_RI, group_size_E):
        row_R1 = jnp.arange(y_RI.shape[0])[:, None]
        return jnp.where(row_R1 < jnp.sum(group_size_E), y_RI, jnp.nan)

    def forward(x_RI, w_EIO, group_size_E):
        return beyond(products.forward(x_RI, w_EIO, group_size_E), group_size_E)

    def input_gradient(dy_RO, w_EIO, group_size_E):
        return beyond(products.input_gradient(dy_RO, w_EIO, group_size_E), group_size_E)

    def weight_gradient(x_RI, dy_RO, group_size_E):
        # What a kernel may assume: finite numbers in every row.  A NaN that is fed comes out.
        fed = jnp.sum(x_RI) * 0 + jnp.sum(dy_RO) * 0
        dw_EIO = products.weight_gradient(x_RI, dy_RO, group_size_E) + fed.astype(x_RI.dtype)
        kept_E = (group_size_E > 0) | products.zeroes_empty
        return jnp.where(kept_E[:, None, None], dw_EIO, jnp.nan)

    return dataclasses.replace(
        products,
        forward=forward,
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
    )


POISONED = poisoned(REFERENCE)


def gradients(backend, x_TD, logits_TE, weights, edit=lambda rows: rows, budget=None):
    """(y_TD, gradients of tokens, logits and weights)."""
    mix_TD = jax.random.normal(jax.random.key(9), x_TD.shape)

    def loss(x_TD, logits_TE, weights):
        routing = TopP(0.6).on_logits(logits_TE, jnp.arange(x_TD.shape[0]) % 5 > 0)
        y_TD, dropped = backend(x_TD, edit(rows_within(routing, budget)), weights)
        return jnp.sum(y_TD.astype(jnp.float32) * mix_TD), (y_TD, dropped)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y_TD, dropped)), wanted = run(x_TD, logits_TE, weights)
    assert dropped == 0
    return y_TD, wanted


@cache
def wanted_of(**shape):
    """The oracle's values and gradients of :func:`draw`, in float32, once for all tests."""
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), draw(**shape))
    return gradients(reference_experts, *wide)


@pytest.mark.parametrize("saved", [0.0, 0.8, 9.0])
def test_garbage_of_kernels_reaches_nothing(saved):
    case = draw()
    backend = partial(ragged_experts, products=POISONED, saved_rows_per_token=saved)
    actual = gradients(backend, *case)
    assert_close(actual, wanted_of())
    dweights = actual[1][2]
    assert np.all(np.asarray(dweights.gate_up_ED2F[1]) == 0)
    assert np.all(np.asarray(dweights.down_EFD[1]) == 0)


@pytest.mark.parametrize("saved", [1.0, 9.0])
def test_garbage_in_rows_that_fill_up_a_tile_reaches_nothing(saved):
    # R = 37 * 3 is rounded up to 112 (in the first part 37 to 48): "no row" is then a row's number.
    case = draw()
    products = dataclasses.replace(POISONED, row_multiple=16)
    backend = partial(ragged_experts, products=products, saved_rows_per_token=saved)
    assert_close(gradients(backend, *case), wanted_of())


def test_a_row_budget_makes_the_memory_smaller():
    x_TD, logits_TE, weights = draw(256)

    def temporary_bytes(budget):
        def loss(x_TD, logits_TE, weights):
            routing = TopP(0.9).on_logits(logits_TE, jnp.ones(256, bool))
            rows = rows_within(routing, budget)
            return jnp.sum(ragged_experts(x_TD, rows, weights, products=REFERENCE)[0])

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return run.lower(x_TD, logits_TE, weights).compile().memory_analysis().temp_size_in_bytes

    # K = 4: without a budget there is a second part of two rows per token.
    assert temporary_bytes(1.0) < 0.7 * temporary_bytes(None)


def test_padding_rows_have_no_gradient():
    x_TD, logits_TE, weights = draw()
    rows = rows_from_routing(TopP(0.6).on_logits(logits_TE, jnp.ones(37, bool)))

    def loss(weight_R):
        weighted = dataclasses.replace(rows, weight_R=weight_R)
        return jnp.sum(ragged_experts(x_TD, weighted, weights, products=POISONED)[0])

    dweight_R = np.asarray(jax.jit(jax.grad(loss))(rows.weight_R))
    assert np.all(dweight_R[~np.asarray(rows.used_R)] == 0)
    assert np.all(dweight_R[np.asarray(rows.used_R)] != 0)


def test_padding_tokens_and_rows_may_hold_nan():
    x_TD, logits_TE, weights = draw()
    padding_T1 = (jnp.arange(x_TD.shape[0]) % 5 == 0)[:, None]

    def edit(rows):
        # Padding rows that point at a token of NaN, with a weight of NaN.
        return dataclasses.replace(
            rows,
            token_R=jnp.where(rows.used_R, rows.token_R, 0),
            weight_R=jnp.where(rows.used_R, rows.weight_R, jnp.nan),
        )

    backend = partial(ragged_experts, products=POISONED)
    clean = gradients(backend, x_TD, logits_TE, weights)
    dirty = gradients(backend, jnp.where(padding_T1, jnp.nan, x_TD), logits_TE, weights, edit=edit)
    assert_close(dirty, clean, 1e-6)


def test_zero_rows_give_zeros():
    x_TD, logits_TE, weights = draw(4)
    router = TopP(0.6)
    rows = rows_from_routing(router.on_logits(logits_TE, jnp.zeros(4, bool)))

    def loss(x_TD, weights):
        y_TD, _ = ragged_experts(x_TD, rows, weights, products=POISONED)
        return jnp.sum(y_TD + 1), y_TD

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y_TD), actual = run(x_TD, weights)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves((y_TD, actual)))


@pytest.mark.parametrize("budget", [pytest.param(None, marks=pytest.mark.long), 0.9])
def test_rows_without_slots_are_scattered(budget):
    case = draw()
    backend = partial(ragged_experts, products=POISONED, saved_rows_per_token=0.7)
    forget = partial(dataclasses.replace, row_TK=None)
    wanted = gradients(reference_experts, *case, budget=budget)
    assert_close(gradients(backend, *case, budget=budget, edit=forget), wanted)
    assert_close(gradients(backend, *case, budget=budget), wanted)


def test_experts_that_choose_tokens():
    # Expert 0 takes tokens 1 and 3, expert 2 tokens 3 and 0: token 3 has two rows, token 2 none.
    x_TD, _, weights = draw(4)
    rows = Rows(
        token_R=jnp.array([1, 3, 3, 0]),
        weight_R=jnp.array([0.5, 0.25, 1.0, 2.0]),
        group_size_E=jnp.array([2, 0, 2, 0]),
        dropped=jnp.int32(0),
    )
    actual, _ = ragged_experts(x_TD, rows, weights, products=XLA)
    wanted, _ = reference_experts(x_TD, rows, weights)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)
    assert np.all(np.asarray(actual[2]) == 0)


def test_gradients_agree_with_finite_differences():
    x_TD, logits_TE, weights = draw(9)
    rows = rows_from_routing(TopP(0.6).on_logits(logits_TE, jnp.ones(9, bool)))

    def loss(x_TD, weight_R, weights):
        weighted = dataclasses.replace(rows, weight_R=weight_R)
        y_TD, _ = ragged_experts(
            x_TD, weighted, weights, products=REFERENCE, saved_rows_per_token=1.0
        )
        return jnp.sum(jnp.sin(y_TD))

    arguments = (x_TD, rows.weight_R, weights)
    check_grads(jax.jit(loss), arguments, order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.long
def test_megablox_kernels():
    case = draw(200)
    backend = partial(
        ragged_experts,
        products=poisoned(megablox_products(240.0, 2**26, interpret=True)),
        saved_rows_per_token=1.0,
    )
    assert_close(gradients(backend, *case), wanted_of(tokens=200))


@pytest.mark.parametrize("saved", [pytest.param(1.0, marks=pytest.mark.long), 9.0])
def test_layer_of_fused_kernels(saved):
    """Gate, up and SwiGLU in one kernel, and rows added up by another; one part, and chunks."""
    case = draw(256, D=128, F=256)
    products = megablox_products(240.0, 2**26, interpret=True)
    used = []

    def recorded(kernel):
        def call(*arguments):
            used.append(result := kernel(*arguments))
            return result

        return call

    products = dataclasses.replace(
        products, swiglu=recorded(products.swiglu), sum_of_rows=recorded(products.sum_of_rows)
    )
    backend = partial(ragged_experts, products=products, saved_rows_per_token=saved)
    assert_close(gradients(backend, *case), wanted_of(tokens=256, D=128, F=256), 1e-4)
    assert len(used) >= 3
    assert all(result is not None for result in used)


def test_megablox_writes_zeros_for_experts_without_rows():
    """Which is why they are not masked; what a kernel does not write is NaN in interpreted mode."""
    rows = jnp.ones((256, 128))
    group_size_E = jnp.array([0, 100, 0, 60, 0])
    products = megablox_products(240.0, 2**26, interpret=True)
    dw_EIO = products.weight_gradient(rows, rows, group_size_E)
    np.testing.assert_array_equal(dw_EIO[:, 0, 0], group_size_E)
    nothing = products.weight_gradient(rows, rows, jnp.zeros(5, jnp.int32))
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("name", [pytest.param("reference", marks=pytest.mark.long), "megablox"])
def test_bfloat16(name):
    products = {
        "reference": REFERENCE,
        "megablox": megablox_products(240.0, 2**26, interpret=True),
    }[name]
    x_TD, logits_TE, weights = draw(200, jnp.bfloat16)
    backend = partial(ragged_experts, products=poisoned(products), saved_rows_per_token=1.0)
    actual = gradients(backend, x_TD, logits_TE, weights)
    assert_close(actual, wanted_of(tokens=200, dtype=jnp.bfloat16), 2e-2)


def test_inside_shard_map_scan_and_checkpoint():
    x_TD, logits_TE, weights = draw(32)
    backend = partial(ragged_experts, products=POISONED, saved_rows_per_token=1.0)

    def gradient(backend):
        def body(x_TD, _):
            routing = TopP(0.6).on_logits(logits_TE, jnp.ones(32, bool))
            y_TD, _ = apply_experts(x_TD, routing, weights, backend)
            return x_TD + y_TD, None

        def loss(x_TD):
            return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(body), x_TD, length=2)[0]))

        return jax.jit(jax.grad(loss))(x_TD)

    wanted = gradient(reference_experts)
    assert_close(gradient(backend), wanted)
    with jax.set_mesh(make_mesh(config.Mesh(data=4), 4, jax.devices()[:4])):
        assert_close(gradient(backend), wanted)


def test_parts_by_hand():
    # R = 7 * 300 rows, S = 2 * 300, n = S / 4 = 150.  In multiples of 512: 2100 -> 2560,
    # 600 -> 1024, 150 -> 512, and (2560 - 1024) / 512 = 3 chunks.
    assert part_bounds(2100, 300, 2.0, 512) == PartBounds(1024, 512, 3)
    assert part_bounds(2100, 300, 2.0, 1) == PartBounds(600, 150, 10)
    # A budget or a top-2 router leaves nothing for a second part.
    assert part_bounds(600, 300, 2.0, 512).chunks == 0
    # Row 600 is the first of the first chunk, row 750 that of the second.
    used = [
        int(part_bounds(2100, 300, 2.0, 1).used_chunks(jnp.int32(n))) for n in (0, 600, 601, 751)
    ]
    assert used == [0, 0, 1, 2]


def test_usual_loads_do_not_compute_the_rest():
    # Top-1 of K = 4 slots: 32 of 128 rows are used, S = 64; all 128 are four chunks of 16 more.
    # The kernels count their calls, two for each part.
    calls = []

    def count(x_RI, w_EIO, group_size_E):
        jax.debug.callback(lambda rows: calls.append(int(rows)), jnp.int32(x_RI.shape[0]))
        return REFERENCE.forward(x_RI, w_EIO, group_size_E)

    x_TD, logits_TE, weights = draw(32)
    products = dataclasses.replace(REFERENCE, forward=count)
    routing = TopK(4).on_logits(logits_TE, jnp.ones(32, bool))
    first_TK = jnp.arange(4) < 1
    for slots, wanted in ((first_TK, [64] * 2), (jnp.ones(4, bool), [64] * 2 + [16] * 8)):
        kept = dataclasses.replace(routing, expert_TK=jnp.where(slots, routing.expert_TK, E))
        calls.clear()
        y_TD, _ = jax.jit(partial(ragged_experts, products=products))(
            x_TD, rows_from_routing(kept), weights
        )
        y_TD.block_until_ready()
        jax.effects_barrier()
        assert calls == wanted


def test_activations_are_kept_for_the_first_rows_alone():
    x_TD, logits_TE, weights = draw(40)
    rows = rows_from_routing(TopK(4).on_logits(logits_TE, jnp.ones(40, bool)))

    def kept(saved):
        def run(x_TD):
            backend = partial(ragged_experts, products=REFERENCE, saved_rows_per_token=saved)
            return backend(x_TD, rows, weights)[0]

        leaves = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(run, x)[1], x_TD))
        return sorted(leaf.shape[0] for leaf in leaves if leaf.shape[1:] == (2 * F,))

    assert kept(0.0) == []
    assert kept(1.5) == [60]
    assert kept(9.0) == [160]
