"""Filters by hand, draws by their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.config import ConfigError
from dynmoe_jax.inference.sampling import (
    Draw,
    Sampling,
    draw_tokens,
    keep_nucleus,
    keep_top_k,
    pick,
    sequence_keys,
)

# Probabilities 0.1, 0.4, 0.05, 0.3, 0.15.
LOGITS_V = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def kept(filtered_BV):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(filtered_BV)]


@pytest.mark.parametrize(
    ("k", "wanted"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, None)]
)
def test_top_k_keeps_the_k_most_probable(k, wanted):
    rows_BV = np.stack([LOGITS_V, LOGITS_V[::-1] + 30])
    mirrored = [4 - token for token in reversed(wanted or range(5))]
    actual = jax.jit(keep_top_k)(rows_BV, jnp.int32(k))
    assert kept(actual) == [wanted or [0, 1, 2, 3, 4], mirrored]
    np.testing.assert_array_equal(np.asarray(actual)[np.isfinite(actual)].size, len(mirrored) * 2)


def test_top_k_keeps_equals_of_the_last_one():
    assert kept(keep_top_k(np.array([[1.0, 3.0, 1.0, 0.0]], np.float32), 2)) == [[0, 1, 2]]


# Most probable first they hold 0.4, 0.7, 0.85, 0.95, 1.
@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.3, [1]), (0.45, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.9, [0, 1, 3, 4]),
     (0.99, [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_nucleus_keeps_the_fewest_that_hold_the_share(share, wanted):
    assert kept(jax.jit(keep_nucleus)(LOGITS_V[None] - 7, jnp.float32(share))) == [wanted]


def test_pick_finds_where_the_cumulative_probability_passes():
    # 0 to 0.1 is token 0, to 0.5 token 1, to 0.55 token 2, to 0.85 token 3.
    uniform_B = np.array([0.0, 0.09, 0.11, 0.49, 0.51, 0.56, 0.84, 0.86, 1 - 2**-24], np.float32)
    probs_BV = np.tile(np.exp(LOGITS_V), (len(uniform_B), 1))
    assert pick(probs_BV, uniform_B).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]


def test_pick_never_takes_what_has_no_probability():
    probs_BV = np.zeros((2, 50), np.float32)
    probs_BV[:, 20] = probs_BV[:, 30] = 0.5
    assert pick(probs_BV, np.array([0.0, 1 - 2**-24], np.float32)).tolist() == [20, 30]


def draws(count, **settings):
    """Shares of the five tokens among many draws; a sixth is no token of the tokenizer."""
    draw = Draw.of(Sampling(**settings), 5, [])
    logits_V = np.append(LOGITS_V, 9.0).astype(np.float32)
    key_B = sequence_keys(7, [[1, 2]], count)
    token_B = jax.jit(draw_tokens)(np.tile(logits_V, (count, 1)), draw, key_B, jnp.int32(0))
    return np.bincount(token_B, minlength=5) / count


@pytest.mark.parametrize(
    ("settings", "weight_V"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0025, 0.09, 0.0225]),
        ({"temperature": 1.0, "top_k": 3}, [0, 0.4, 0, 0.3, 0.15]),
        ({"temperature": 1.0, "nucleus": 0.6}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_k": 3, "nucleus": 0.5}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_probable(settings, weight_V):
    share_V, count = np.array(weight_V) / np.sum(weight_V), 4000
    error_V = np.sqrt(share_V * (1 - share_V) / count)
    assert np.all(np.abs(draws(count, **settings) - share_V) <= 4 * error_V)


def test_a_sequence_has_the_same_key_in_any_company():
    prompts = [np.array([1, 2], np.int32), np.array([3], np.int32)]
    together = jax.random.key_data(sequence_keys(0, prompts, 2))
    alone = jax.random.key_data(sequence_keys(0, prompts[1:], 2))
    np.testing.assert_array_equal(together[2:], alone)
    assert len(np.unique(together, axis=0)) == 4
    assert not np.array_equal(alone, jax.random.key_data(sequence_keys(1, prompts[1:], 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"--temperature=-0.1 must be at least 0."),
        ({"nucleus": 0.0}, r"--nucleus=0.0 must be greater than 0."),
        ({"nucleus": 1.5}, r"--nucleus=1.5 must be at most 1."),
        ({"top_k": -1}, r"--top_k=-1 must be at least 0."),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
