"""Small decoders for the tests of the model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder

SMALL = config.Model(
    num_layers=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    hidden_width=24,
    vocab_size=32,
    max_seq_len=16,
    dtype="float32",
    moe=config.MoE(num_experts=4, hidden_width=12, top_p={"threshold": 0.6}, backend="grouped"),
)


def small_model(**changes):
    """SMALL with some settings of the model or, failing that, of its MoE changed."""
    model = {name: value for name, value in changes.items() if name in vars(SMALL)}
    moe = {name: value for name, value in changes.items() if name not in model}
    model.setdefault("moe", dataclasses.replace(SMALL.moe, **moe))
    return dataclasses.replace(SMALL, **model)


def draw_decoder(model, seed=0):
    """A decoder with parameters of order one, drawn by numpy: nothing has to compile."""
    structure, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1] == "scale":
            return random.uniform(0.5, 1.5, leaf.shape)
        return random.normal(scale=0.3, size=leaf.shape)

    leaves = [
        (path, leaf.replace(jnp.asarray(draw(path, leaf), jnp.float32)))
        for path, leaf in shapes.flat_state()
    ]
    return nnx.merge(structure, nnx.from_flat_state(leaves))


@pytest.fixture(scope="session")
def small():
    """See :func:`small_model`."""
    return small_model


@pytest.fixture(scope="session")
def draw():
    """See :func:`draw_decoder`."""
    return draw_decoder


@pytest.fixture(scope="session")
def run():
    """(decoder, tokens, segment ids, positions) -> DecoderOutput, compiled once per shape."""
    return nnx.jit(lambda decoder, *inputs: decoder(*inputs))
