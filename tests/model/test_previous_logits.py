"""Routers that read the logits of the MoE layer before, in every way that layers are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.model.kv_cache import (
    decode_step,
    prefill,
    stacked,
    unstacked,
    unstacked_cache,
    with_room,
)
from dynmoe_jax.model.walk import walk
from tests.training.test_router_states import settings, steps

MOE = {"router": "moe_plus_plus", "moe_plus_plus": {"zeros": 1, "copies": 1, "constants": 2}}
FREE = 4
UNLIKE = "2:feed_forward=dense;3:moe.num_experts=3;4:moe.num_experts=6"
TOKENS_BL = np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module", params=["", UNLIKE], ids=["alike", "unlike"])
def decoder(request, small, draw):
    layers = 5 if request.param else 3
    return draw(small(num_layers=layers, layers=request.param, **MOE))


@pytest.fixture(scope="module")
def output(decoder, run):
    return run(decoder, TOKENS_BL)


def test_logits_are_those_of_the_layer_plus_those_of_the_layer_before(decoder, output):
    """By hand from the stream in front of each feed-forward, which `walk` tells."""
    batch = {
        "tokens": TOKENS_BL,
        "segment_ids": np.ones_like(TOKENS_BL),
        "positions": np.broadcast_to(np.arange(6), TOKENS_BL.shape),
    }
    modules = {}
    for feed, norms, numbers in _feeds(decoder):
        for place, number in enumerate(numbers):
            names = ("router_DE", "residual_SS")
            arrays = [np.asarray(getattr(feed, name)[...])[place] for name in names]
            modules[number] = (np.asarray(norms.scale[...])[place], *arrays)
    previous_TS, found = np.zeros((12, 0)), []
    for number, layer in walk(decoder, batch, lambda layer: (layer.attended_BLD, layer.routing)):
        if layer[1] is None:
            continue
        scale_D, router_DS, residual_SS = modules[number]
        x_TD = np.asarray(layer[0], np.float64).reshape(12, -1)
        normed_TD = x_TD / np.sqrt(np.mean(x_TD**2, -1, keepdims=True) + 1e-6) * scale_D
        scores = router_DS.shape[1]
        before_TS = np.zeros((12, scores))
        if previous_TS.size:
            common = min(scores, previous_TS.shape[1]) - FREE
            before_TS[:, :common] = previous_TS[:, :common]
            before_TS[:, -FREE:] = previous_TS[:, -FREE:]
        wanted_TS = normed_TD @ router_DS + before_TS @ residual_SS.T
        previous_TS = np.asarray(layer[1].logits_TE)
        np.testing.assert_allclose(previous_TS, wanted_TS, rtol=1e-3, atol=1e-4)
        found.append(previous_TS)
    # The decoder's loop over layers gives the same, padded to the most scores.
    for told_TS, walked_TS in zip(output.routing.by_layer.logits_TE, found, strict=True):
        scores = walked_TS.shape[1]
        np.testing.assert_allclose(told_TS[:, :scores], walked_TS, rtol=1e-4, atol=1e-5)
    assert len(found) == decoder.config.num_moe_layers


def _feeds(decoder):
    """(feed-forward, norm before it, numbers of its layers) of the MoE layers."""
    layers = [layer for stack in decoder.stacks for layer in stack.layers if layer.is_moe]
    for layer, numbers in zip(layers, decoder.moe_layers, strict=True):
        yield layer.feed_forward, layer.feed_forward_norm, numbers


def test_token_by_token_is_all_at_once(decoder, output):
    context, copied = 4, bool(decoder.config.layers)
    _, cache, used_NBP = prefill(decoder, TOKENS_BL[:, :context], np.zeros(2, np.int32))
    cache = with_room(cache, 6)
    cache, layers = (
        (unstacked_cache(cache), unstacked(decoder)) if copied else (cache, stacked(decoder))
    )
    step = jax.jit(lambda token_B1, cache: _step(decoder, layers, token_B1, cache))
    counts = [used_NBP]
    for position in range(context, 6):
        logits_B1V, cache, used_NB1 = step(TOKENS_BL[:, position : position + 1], cache)
        counts.append(used_NB1)
        wanted_BV = output.logits[:, position]
        np.testing.assert_allclose(logits_B1V[:, 0], wanted_BV, rtol=1e-5, atol=1e-5)
    used_NBL = np.concatenate(counts, axis=2)
    np.testing.assert_array_equal(used_NBL, output.routing.experts_per_token)
    # Some tokens of some layers use free experts in place of others.
    assert used_NBL.min() < 2 == used_NBL.max()


def _step(decoder, layers, token_B1, cache):
    valid_B1 = jnp.ones(token_B1.shape, bool)
    x_B1D, cache, used_NB1 = decode_step(decoder, layers, token_B1, valid_B1, cache)
    return decoder.logits(x_B1D), cache, used_NB1


def test_training_on_eight_devices_is_that_on_one():
    mesh = config.Mesh(data=2, expert=2, model=2)
    cfg = settings(MOE)
    # Computed again for backward, in a loop over the layers.
    model = dataclasses.replace(cfg.model, num_layers=3, remat="layer", unroll=1)
    cfg = dataclasses.replace(cfg, model=model)
    alone, one = steps(cfg)
    together, eight = steps(dataclasses.replace(cfg, mesh=mesh))
    np.testing.assert_allclose(one["loss"], eight["loss"], rtol=1e-5)
    np.testing.assert_allclose(one["grad_norm"], eight["grad_norm"], rtol=1e-4)
    residual = {path: leaf[...] for path, leaf in alone.params.flat_state() if
                path[-1] == "residual_SS"}  # fmt: skip
    ((path, residual_NSS),) = residual.items()
    same_NSS = dict(together.params.flat_state())[path][...]
    np.testing.assert_allclose(residual_NSS, same_NSS, rtol=1e-3, atol=1e-5)
    # All layers but the first learn what the one before tells.
    assert np.all(residual_NSS[0] == 0)
    assert np.all(np.any(residual_NSS[1:] != 0, axis=(1, 2)))
