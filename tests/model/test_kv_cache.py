"""Computing with a cache against computing everything at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.model.kv_cache import (
    decode_step,
    prefill,
    repeated,
    stacked,
    unstacked,
    unstacked_cache,
    with_room,
)

MODELS = {
    "top_p": {},
    "top_k": {"router": "top_k"},
    "every_second_layer": {"num_layers": 4, "every_n_layers": 2},
    "all_that_other_architectures_have": {
        "num_layers": 3,
        "dense_first_layers": 1,
        "shared_hidden_width": 8,
        "shared_gate": True,
        "attention_bias": True,
        "qk_norm": True,
    },
    "sequences_and_thresholds": {
        "router": "seq_top_k",
        "layers": "1:moe.router=expert_threshold",
        "allow_non_causal": True,
    },
    "dense_tied": {"every_n_layers": 0, "tie_embeddings": True},
}
TOKENS_BL = np.random.default_rng(0).integers(0, 32, (2, 8)).astype(np.int32)
CONTEXT, SLOTS = 5, 11
START_B = np.array([0, 2], np.int32)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@partial(jax.jit, static_argnums=0)
def whole(structure, params, tokens_BL, segment_ids_BL=None, positions_BL=None):
    output = nnx.merge(structure, params)(tokens_BL, segment_ids_BL, positions_BL)
    return output.logits, output.routing and output.routing.experts_per_token


@partial(jax.jit, static_argnums=0)
def read_context(structure, params, tokens_BP, start_B):
    decoder = nnx.merge(structure, params)
    x_BPD, cache, experts_NBP = prefill(decoder, tokens_BP, start_B)
    return decoder.logits(x_BPD), with_room(cache, SLOTS), experts_NBP


@partial(jax.jit, static_argnums=0)
def go_on(structure, params, layers, tokens_BC, cache):
    """``layers``: None for a scan."""
    decoder = nnx.merge(structure, params)
    stacks = stacked(decoder) if layers is None else layers
    valid_BC = jnp.ones(tokens_BC.shape, bool)
    x_BCD, cache, experts_NBC = decode_step(decoder, stacks, tokens_BC, valid_BC, cache)
    return decoder.logits(x_BCD), cache, experts_NBC


@pytest.fixture(scope="module", params=MODELS)
def model(request, small, draw):
    return nnx.split(draw(small(**MODELS[request.param])))


@pytest.fixture(scope="module", params=["top_p", "sequences_and_thresholds"])
def routed(request, small, draw):
    return nnx.split(draw(small(**MODELS[request.param])))


@partial(jax.jit, static_argnums=0)
def copied(structure, params):
    return unstacked(nnx.merge(structure, params))


def one_by_one(model, layers, cache):
    """(logits, experts) of the positions behind the context, a call for each."""
    parts = []
    for position in range(CONTEXT, TOKENS_BL.shape[1]):
        token_B1 = TOKENS_BL[:, position : position + 1]
        logits_B1V, cache, experts_NB1 = go_on(*model, layers, token_B1, cache)
        parts.append((logits_B1V, experts_NB1))
    logits, experts = zip(*parts, strict=True)
    return np.concatenate(logits, axis=1), np.concatenate(experts, axis=2)


def test_one_by_one_equals_all_at_once(model):
    wanted_BLV, wanted_NBL = whole(*model, TOKENS_BL)
    nothing_before = jnp.zeros(2, jnp.int32)
    context_BPV, cache, context_NBP = read_context(*model, TOKENS_BL[:, :CONTEXT], nothing_before)
    logits_BCV, experts_NBC = one_by_one(model, copied(*model), unstacked_cache(cache))
    actual_BLV = np.concatenate([context_BPV, logits_BCV], axis=1)
    np.testing.assert_allclose(actual_BLV, wanted_BLV, **TOLERANCE)
    experts_NBL = np.concatenate([context_NBP, experts_NBC], axis=2)
    if wanted_NBL is None:
        assert experts_NBL.shape[0] == 0
    else:
        np.testing.assert_array_equal(experts_NBL, wanted_NBL)


def test_layers_in_a_scan_give_the_same(model):
    wanted_BLV, wanted_NBL = whole(*model, TOKENS_BL)
    _, cache, _ = read_context(*model, TOKENS_BL[:, :CONTEXT], jnp.zeros(2, jnp.int32))
    logits_BCV, _, experts_NBC = go_on(*model, None, TOKENS_BL[:, CONTEXT:], cache)
    np.testing.assert_allclose(logits_BCV, wanted_BLV[:, CONTEXT:], **TOLERANCE)
    if wanted_NBL is not None:
        np.testing.assert_array_equal(experts_NBC, wanted_NBL[:, :, CONTEXT:])


def test_several_positions_at_once_behind_contexts_of_different_lengths(routed):
    context_BPV, cache, context_NBP = read_context(*routed, TOKENS_BL[:, :CONTEXT], START_B)
    logits_BCV, _, experts_NBC = go_on(*routed, None, TOKENS_BL[:, CONTEXT:], cache)
    for row, start in enumerate(START_B):
        alone_1LV, alone_N1L = whole(*routed, TOKENS_BL[row : row + 1, start:])
        actual_LV = np.concatenate([context_BPV[row, start:], logits_BCV[row]])
        np.testing.assert_allclose(actual_LV, alone_1LV[0], **TOLERANCE)
        actual_NL = np.concatenate([context_NBP[:, row, start:], experts_NBC[:, row]], axis=1)
        np.testing.assert_array_equal(actual_NL, alone_N1L[:, 0])
        assert not np.any(context_NBP[:, row, :start])  # what fills up uses no experts


def test_a_context_is_read_once_for_many_continuations(routed):
    _, cache, _ = read_context(*routed, TOKENS_BL[:, :CONTEXT], START_B)
    endings_BC = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.int32)
    together_BCV = go_on(*routed, None, endings_BC, repeated(cache, 2))[0]
    first_BCV = go_on(*routed, None, endings_BC[::2], cache)[0]
    second_BCV = go_on(*routed, None, endings_BC[1::2], cache)[0]
    np.testing.assert_allclose(together_BCV[::2], first_BCV, **TOLERANCE)
    np.testing.assert_allclose(together_BCV[1::2], second_BCV, **TOLERANCE)
    assert np.abs(first_BCV - second_BCV).max() > 1e-2


def test_copied_layers_are_in_the_compute_type_and_change_nothing(small, draw):
    model = nnx.split(draw(small(dtype="bfloat16", qk_norm=True)))
    layers = copied(*model)
    dtypes = {path: leaf.dtype for path, leaf in nnx.to_flat_state(layers[0][0])}
    assert {path[-1] for path, dtype in dtypes.items() if dtype == jnp.float32} == {
        "scale",
        "query_scale_HW",
        "key_scale_GW",
        "router_DE",
    }
    _, cache, _ = read_context(*model, TOKENS_BL[:, :CONTEXT], START_B)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache.kv))
    wanted = go_on(*model, None, TOKENS_BL[:, CONTEXT:], cache)[0]
    actual = go_on(*model, layers, TOKENS_BL[:, CONTEXT:], unstacked_cache(cache))[0]
    np.testing.assert_allclose(actual, wanted, rtol=5e-2, atol=5e-2)
