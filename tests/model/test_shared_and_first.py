"""What some architectures add: a shared expert, a scale, dense layers first, another MoE layer."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.parameters import active_parameters, count_parameters

T, D = 6, 16
X_TD = np.random.default_rng(4).normal(size=(T, D)).astype(np.float32)
POSITIONS = TokenPositions(np.ones((1, T), np.int32), None)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8))


def shapes_of(model):
    return {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}


def first_moe(decoder):
    """The feed-forward of the first MoE layer."""
    model = decoder.config
    structure = nnx.graphdef(nnx.eval_shape(lambda: MoEFeedForward(model, rngs=nnx.Rngs(0))))
    state = nnx.state(decoder.groups.layers[model.moe.layer_offset].feed_forward)
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf[0], state))


def run_on_tokens(feed_forward):
    """(y_TD, record of the routing)."""
    return feed_forward(X_TD, X_TD @ feed_forward.router_DE[...], POSITIONS)


@nnx.jit
def feed(feed_forward):
    return run_on_tokens(feed_forward)[0]


def without(feed_forward, **changes):
    """The same parameters, with other settings."""
    other = nnx.clone(feed_forward)
    other.moe = dataclasses.replace(feed_forward.moe, **changes)
    return other


def shared_by_hand(feed_forward):
    gate_up_D2F = np.asarray(feed_forward.shared_gate_up_D2F[...], np.float64)
    gate, up = np.split(X_TD @ gate_up_D2F, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ np.asarray(feed_forward.shared_down_FD[...])


def test_shared_expert_is_added_to_every_token(small, draw):
    feed_forward = first_moe(draw(small(shared_hidden_width=20)))
    added = feed(feed_forward) - feed(without(feed_forward, shared_hidden_width=0))
    np.testing.assert_allclose(added, shared_by_hand(feed_forward), rtol=0, atol=1e-5)


def test_shared_gate_is_a_sigmoid_of_the_token(small, draw):
    feed_forward = first_moe(draw(small(shared_hidden_width=20, shared_gate=True)))
    added = feed(feed_forward) - feed(without(feed_forward, shared_hidden_width=0))
    gate_T1 = 1 / (1 + np.exp(-X_TD @ np.asarray(feed_forward.shared_router_D1[...])))
    assert np.ptp(gate_T1) > 0.2
    np.testing.assert_allclose(added, gate_T1 * shared_by_hand(feed_forward), rtol=0, atol=1e-5)


def test_routed_scale_leaves_the_shared_expert_alone(small, draw):
    plain = first_moe(draw(small(shared_hidden_width=20)))
    routed = feed(without(plain, shared_hidden_width=0))
    scaled = feed(without(plain, routed_scale=2.5))
    np.testing.assert_allclose(scaled - feed(plain), 1.5 * routed, rtol=0, atol=1e-5)


def test_the_record_is_that_of_the_router_whatever_the_scale(small, draw):
    plain = first_moe(draw(small()))
    run = nnx.jit(lambda feed_forward: run_on_tokens(feed_forward)[1].routing)
    scaled = run(without(plain, routed_scale=2.5))
    np.testing.assert_array_equal(scaled.probs_TE, run(plain).probs_TE)
    np.testing.assert_array_equal(scaled.weight_TK, run(plain).weight_TK)


def test_dense_layers_before_all_others(small, draw, run):
    model = small(num_layers=5, every_n_layers=2, dense_first_layers=1)
    shapes = shapes_of(model)
    assert shapes["first_groups", "layers", 0, "feed_forward", "down_FD"] == (1, 24, 16)
    assert shapes["groups", "layers", 0, "feed_forward", "down_EFD"] == (2, 4, 12, 16)
    assert shapes["groups", "layers", 1, "feed_forward", "down_FD"] == (2, 24, 16)
    decoder = draw(model)

    @nnx.jit
    def looped(decoder):
        x_BLD = decoder.embed(TOKENS)
        segments, positions = np.ones_like(TOKENS), np.broadcast_to(np.arange(8), TOKENS.shape)
        for stack, length in ((decoder.first_groups, 1), (decoder.groups, 2)):
            structure, params = nnx.split(stack)
            for i in range(length):
                group = nnx.merge(structure, jax.tree.map(lambda leaf, i=i: leaf[i], params))
                for layer in group.layers:
                    x_BLD = layer(x_BLD, TokenPositions(segments, decoder.rotary(positions))).x_BLD
        return decoder.norm(x_BLD) @ decoder.output_DV

    output = run(decoder, TOKENS)
    np.testing.assert_allclose(output.logits, looped(decoder), rtol=1e-5, atol=1e-5)
    assert output.routing.experts_per_token.shape == (2, 2, 8)


def test_last_of_every_two_layers_is_moe(small, draw, run):
    model = small(num_layers=4, every_n_layers=2, layer_offset=1)
    shapes = shapes_of(model)
    assert shapes["groups", "layers", 0, "feed_forward", "down_FD"] == (2, 24, 16)
    assert shapes["groups", "layers", 1, "feed_forward", "down_EFD"] == (2, 4, 12, 16)
    assert run(draw(model), TOKENS).routing.experts_per_token.shape == (2, 2, 8)


def test_counts_by_hand(small):
    # D=16, V=32, H W = 16, G W = 8: attention 768, norms 32 a layer; an expert 3 16 12 = 576, a
    # router 64, a dense feed-forward 1152, a shared expert 3 16 20 = 960 and its gate 16.
    # Biases 16 + 8 + 8 and norms of queries and keys 16 + 8 a layer.
    model = small(num_layers=3, dense_first_layers=1, shared_hidden_width=20, shared_gate=True)
    model = dataclasses.replace(model, attention_bias=True, qk_norm=True)
    rest = 2 * 512 + 16 + 3 * (768 + 32 + 32 + 24) + 1152 + 2 * (64 + 960 + 16)
    assert count_parameters(model) == rest + 2 * 4 * 576
    assert active_parameters(model, 1.5) == rest + 3 * 576
    # Two FLOPs for each number of a matrix and token, and 4 H W L/2 for the scores of attention.
    matrices = 512 + 3 * 768 + 1152 + 2 * (64 + 960 + 16)
    assert forward_flops(model, tokens=10, length=8, rows=0) == 10 * (
        2 * matrices + 3 * 4 * 16 * 8 / 2
    )
    assert forward_flops(model, 0, 8, rows=7) == 2 * 7 * 576


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_first_layers": 2}, "dense_first_layers=2 leaves no MoE layer"),
        ({"dense_first_layers": 1, "every_n_layers": 0}, "dense_first_layers=1 leaves no MoE"),
        ({"dense_first_layers": 1, "every_n_layers": 2}, "divide .*num_layers=2 less"),
        ({"layer_offset": 1}, "layer_offset=1 must be less than config.model.moe.every_n_layers=1"),
        ({"shared_gate": True}, "shared_gate=True has no shared expert"),
    ],
)
def test_settings_that_contradict_each_other(small, changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.Config(model=small(**changes), data=config.Data(seq_len=8))
