"""Where the first bad number is said to be, for numbers that were made bad on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.training.health.nan_report import check_backward, check_forward, check_state
from dynmoe_jax.training.step import TrainState

MODEL = config.Model(
    num_layers=4,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    hidden_width=8,
    vocab_size=16,
    max_seq_len=4,
    init_std=0.3,
    moe=config.MoE(num_experts=4, hidden_width=4, every_n_layers=2, backend="reference"),
)
BATCH = {
    "tokens": np.arange(8).reshape(2, 4).astype(np.int32),
    "targets": np.ones((2, 4), np.int32),
    "segment_ids": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
    "positions": np.broadcast_to(np.arange(4, dtype=np.int32), (2, 4)),
}


@pytest.fixture
def decoder():
    return Decoder(MODEL, rngs=nnx.Rngs(0))


def first_bad(places):
    return next((place.name for place in places if place.bad), None)


def forward(decoder):
    return check_forward(decoder, BATCH, config.Loss())


def spoil(parameter, *index):
    parameter[...] = parameter[...].at[index].set(jnp.nan)


def test_sound_pass_has_no_bad_place_and_every_layer_in_order(decoder):
    places, _ = forward(decoder)
    assert first_bad(places) is None
    # Of every two layers the first is MoE, and has a router.
    layers = [
        f"layer {n}: {part}"
        for n in range(4)
        for part in ("after attention", "router logits", "after feed-forward")
        if part != "router logits" or n % 2 == 0
    ]
    assert [place.name for place in places] == [
        "embedding",
        *layers,
        "last norm",
        "loss of each token",
    ]


def test_first_place_of_a_spoilt_layer(decoder):
    spoil(decoder.groups.layers[0].feed_forward.router_DE, 1, 0, 0)
    assert first_bad(forward(decoder)[0]) == "layer 2: router logits"
    spoil(decoder.groups.layers[1].attention.query_DHW, 0, 0, 0, 0)
    assert first_bad(forward(decoder)[0]) == "layer 1: after attention"


def test_padding_is_not_looked_at(decoder):
    spoil(decoder.embedding_VD, 6, 0)  # a token of padding alone
    assert forward(decoder)[0][0].bad == 0


def test_spoilt_token_is_found_in_its_sequence(decoder):
    spoil(decoder.embedding_VD, 2, 0)
    places, nll_BL = forward(decoder)
    assert (places[0].name, places[0].bad) == ("embedding", 1)
    np.testing.assert_array_equal(np.isfinite(nll_BL).all(axis=-1), [False, True])


def test_parameters_and_moments_are_named_by_layer(decoder):
    spoil(decoder.groups.layers[1].feed_forward.down_FD, 1, 0, 0)
    params = nnx.state(decoder, nnx.Param)
    state = TrainState(jnp.int32(0), params, {"mu": params, "count": jnp.int32(3)})
    bad = [place.name for place in check_state(state, MODEL) if place.bad]
    assert bad == [
        "layer 3: parameter feed_forward down_FD",
        "layer 3: optimizer mu feed_forward down_FD",
    ]


def test_dense_layers_before_all_others_come_first():
    moe = dataclasses.replace(MODEL.moe, dense_first_layers=2, layer_offset=1)
    model = dataclasses.replace(MODEL, moe=moe)
    decoder = Decoder(model, rngs=nnx.Rngs(0))
    names = [place.name for place in forward(decoder)[0]]
    assert [name for name in names if "router" in name] == ["layer 3: router logits"]
    spoil(decoder.first_groups.layers[0].feed_forward.down_FD, 1, 0, 0)
    spoil(decoder.groups.layers[1].feed_forward.router_DE, 0, 0, 0)
    params = nnx.state(decoder, nnx.Param)
    places = check_state(TrainState(jnp.int32(0), params, {}), model)
    assert [place.name for place in places if place.bad] == [
        "layer 1: parameter feed_forward down_FD",
        "layer 3: parameter feed_forward router_DE",
    ]


def test_gradients_come_in_the_order_of_backward(decoder):
    gradients = jax.tree.map(jnp.zeros_like, nnx.state(decoder, nnx.Param))
    names = [place.name for place in check_backward(gradients, MODEL)]
    assert names[:2] == ["norm scale", "head_DV"]
    assert names[-1] == "embedding_VD"
    layers = [int(name[6]) for name in names if name.startswith("layer")]
    assert layers == sorted(layers, reverse=True)
    of_layer_2 = [name for name in names if name.startswith("layer 2")]
    assert of_layer_2.index("layer 2: feed_forward router_DE") < of_layer_2.index(
        "layer 2: attention query_DHW"
    )


def test_largest_is_that_of_the_finite_numbers(decoder):
    decoder.embedding_VD[...] = decoder.embedding_VD[...].at[0].set(-50.0).at[1, 0].set(jnp.inf)
    place = next(
        p for p in check_state(_state(decoder), MODEL) if p.name == "parameter embedding_VD"
    )
    assert dataclasses.astuple(place)[1:] == (1, 50.0)


def _state(decoder):
    return TrainState(jnp.int32(0), nnx.state(decoder, nnx.Param), {})
