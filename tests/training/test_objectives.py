"""Objectives: which tokens count, worked out by hand, and promises of every registered one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.registry import OBJECTIVES
from dynmoe_jax.training.objectives.response_only import ResponseOnly, _WithIds

BEGIN, END = 7, 8


class Words:
    """A tokenizer of whole words."""

    def encode(self, text):
        """Numbers of the words."""
        return np.array([{"<a>": BEGIN, "<e>": END, "two": 1, "": 0}[w] for w in text.split()], int)


def weights(tokens, segments=None, **settings):
    objective = ResponseOnly(**{"begin": "<a>", **settings}).prepared(Words())
    tokens_BL = jnp.array([tokens])
    segments_BL = jnp.ones_like(tokens_BL) if segments is None else jnp.array([segments])
    return objective.loss_weights({"tokens": tokens_BL, "segment_ids": segments_BL})[0].tolist()


def test_what_follows_the_mark_counts():
    # Position i predicts token i + 1, so the mark itself predicts the response's first token.
    assert weights([3, BEGIN, 4, 5]) == [0, 1, 1, 1]


def test_the_end_is_learned_and_what_follows_it_is_not():
    assert weights([BEGIN, 4, END, 3, BEGIN, 5], end="<e>") == [1, 1, 0, 0, 1, 1]


def test_a_mark_of_one_document_says_nothing_about_the_next():
    tokens, segments = [3, BEGIN, 4, 4, 5, BEGIN, 6, 0], [1, 1, 1, 2, 2, 2, 2, 0]
    assert weights(tokens, segments) == [0, 1, 1, 0, 0, 1, 1, 0]


def test_a_mark_of_several_tokens_must_stand_there_whole():
    tokens = [BEGIN, 1, 4, 1, BEGIN, 4, BEGIN]
    assert weights(tokens, begin="<a> two") == [0, 1, 1, 1, 1, 1, 1]
    # Its first token is the last of another document.
    assert weights([BEGIN, 1, 4], [1, 2, 2], begin="<a> two") == [0, 0, 0]


def test_a_mark_without_tokens_is_refused():
    with pytest.raises(config.ConfigError, match=r"response_only\.begin='' has no tokens"):
        ResponseOnly(begin="").prepared(Words())


@pytest.fixture(scope="module")
def decoder():
    model = config.Model(
        num_layers=1,
        width=8,
        num_heads=1,
        num_kv_heads=1,
        head_width=8,
        hidden_width=8,
        vocab_size=16,
        init_std=0.5,
        max_seq_len=8,
        moe=config.MoE(every_n_layers=0),
    )
    return Decoder(model, rngs=nnx.Rngs(0))


def batch():
    draw = np.random.default_rng(0)
    tokens_BL = draw.integers(0, 16, (4, 8))
    tokens_BL[:, 2] = 0
    segments_BL = np.ones((4, 8), int)
    segments_BL[1, 5:] = 0
    arrays = {"tokens": tokens_BL, "targets": np.roll(tokens_BL, -1, 1), "segment_ids": segments_BL}
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def value(objective, decoder, x_BLD, part):
    sums = objective.sums(decoder, x_BLD, part, config.Loss(z_weight=0.1))
    return objective.value(sums)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_additive_as_declared(name, decoder):
    objective, whole = OBJECTIVES[name](), batch()
    x_BLD = jax.random.normal(jax.random.key(1), (4, 8, 8))
    halves = [({k: v[i::2] for k, v in whole.items()}, x_BLD[i::2]) for i in range(2)]
    shares = [jnp.sum(objective.loss_weights(part)) for part, _ in halves]
    parts = [value(objective, decoder, x, part) for part, x in halves]
    mean = sum(s * v for s, v in zip(shares, parts, strict=True)) / sum(shares)
    linear = np.allclose(mean, value(objective, decoder, x_BLD, whole), rtol=1e-5)
    assert linear == objective.additive


@pytest.mark.parametrize("name", OBJECTIVES)
def test_positions_without_weight_count_nowhere(name, decoder):
    objective, given = OBJECTIVES[name](), batch()
    weight_BL = objective.loss_weights(given)
    assert 0 < weight_BL.sum() < weight_BL.size
    x_BLD = jax.random.normal(jax.random.key(1), (4, 8, 8))
    poisoned_BLD = jnp.where(weight_BL[..., None] > 0, x_BLD, jnp.nan)
    of = lambda x: value(objective, decoder, x, given)  # noqa: E731
    clean, poisoned = jax.value_and_grad(of)(x_BLD), jax.value_and_grad(of)(poisoned_BLD)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_slope(name, decoder):
    objective, given = OBJECTIVES[name](), batch()
    x_BLD, along_BLD = jax.random.normal(jax.random.key(1), (2, 4, 8, 8))
    of = lambda t: value(objective, decoder, x_BLD + t * along_BLD, given)  # noqa: E731
    ends = of(1e-2), of(-1e-2)
    np.testing.assert_allclose(jax.grad(of)(0.0), (ends[0] - ends[1]) / 2e-2, rtol=1e-2)


def test_prepared_marks_are_no_settings():
    prepared = ResponseOnly(begin="<a>").prepared(Words())
    assert isinstance(prepared, _WithIds)
    settings = [f.name for f in dataclasses.fields(prepared) if "help" in f.metadata]
    assert settings == ["begin", "end"]


@dataclasses.dataclass(frozen=True)
class Faint(ResponseOnly):
    """Responses whose tokens weigh very little."""

    def loss_weights(self, batch):
        """A thousandth each."""
        return 1e-3 * super().loss_weights(batch)


def test_a_mean_does_not_depend_on_what_all_positions_weigh(decoder):
    x_BLD = jax.random.normal(jax.random.key(1), (4, 8, 8))
    means = [value(kind(), decoder, x_BLD, batch()) for kind in (ResponseOnly, Faint)]
    np.testing.assert_allclose(*means, rtol=1e-5)
