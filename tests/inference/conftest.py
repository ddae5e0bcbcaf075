"""A small decoder, and a tokenizer of its vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.model import Decoder, parameter_shapes

MODEL = config.Model(
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    hidden_width=8,
    vocab_size=40,
    max_seq_len=48,
    moe=config.MoE(num_experts=4, hidden_width=8, top_p={"threshold": 0.6}),
)


class Letters:
    """A tokenizer: BOS, EOS, then letters; 30 is a word, 31 and 32 are the bytes of é."""

    vocab_size, bos_id, eos_id = 33, 0, 1
    begins_with_bos = True
    _words = ("", "", *"abcdefghijklmnopqrstuvwxyz ,", "stop")

    def encode(self, text):
        return np.array([self._words.index(letter) for letter in text], np.int32)

    def decode(self, ids):
        pieces = [
            self._words[token].encode() if token < 31 else "é".encode()[token - 31 : token - 30]
            for token in ids
        ]
        return b"".join(pieces).decode(errors="replace")


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture(scope="session")
def decoder():
    rng = np.random.default_rng(3)
    structure = nnx.graphdef(nnx.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))))
    fill = lambda x: jnp.asarray(rng.normal(scale=0.8, size=x.shape), jnp.float32)  # noqa: E731
    return nnx.merge(structure, jax.tree.map(fill, parameter_shapes(MODEL)))


@pytest.fixture(scope="session")
def generator(decoder):
    """One for all tests: it keeps its programs."""
    return Generator(decoder)
