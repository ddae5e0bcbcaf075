"""Sampling of the next token from logits.

Filters look for a threshold bit by bit instead of sorting: non-negative floats are ordered like
their bits, so thirty-one counts find the exact one.

Axis legend: B sequences, V vocabulary, Z stop tokens.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from dynmoe_jax.fields import check_value, free_setting, walk

_STOPS_PADDED_TO = 4
NO_TOKEN = -1
MOST_BY_DEFAULT = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling.  The only home of these defaults."""

    max_tokens: int = free_setting(
        0,
        f"tokens to write at most; 0 = as many as the model has room for, up to {MOST_BY_DEFAULT}",
        unit="tokens",
        low=0,
    )
    temperature: float = free_setting(0.8, "logits are divided by it; 0 = greedy", low=0.0)
    top_k: int = free_setting(0, "draw from so many most probable tokens; 0 = all", low=0)
    nucleus: float = free_setting(
        1.0,
        "draw from the fewest most probable tokens that hold this share; 1 = all (elsewhere top-p, "
        "here the name of a router)",
        above=0.0,
        high=1.0,
    )
    seed: int = free_setting(0, "of the draws", low=0, high=2**31 - 1)

    def __post_init__(self):
        for path, field, value in walk(self):
            check_value(path, field, value, prefix="--")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Parameters of sampling for a compiled program; all of it data, so that one fits all.

    Attributes:
      temperature, top_k, nucleus: as in :class:`Sampling`; a temperature of None is greedy in a
        program that cannot do anything else, and compiles sooner.
      vocab_size: of the tokenizer; a model may have more rows, which mean nothing.
      stop_Z: tokens that end a sequence, filled up with ``NO_TOKEN``.
    """

    temperature: Float[Array, ""] | None
    top_k: Int[Array, ""] | None
    nucleus: Float[Array, ""] | None
    vocab_size: Int[Array, ""]
    stop_Z: Int[Array, "Z"]

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int, stop_ids: Sequence[int]) -> "Draw":
        """Makes the parameters from settings."""
        stops = np.full(-(-max(1, len(stop_ids)) // _STOPS_PADDED_TO) * _STOPS_PADDED_TO, NO_TOKEN)
        stops[: len(stop_ids)] = stop_ids
        return cls(
            jnp.float32(sampling.temperature),
            jnp.int32(sampling.top_k),
            jnp.float32(sampling.nucleus),
            jnp.int32(vocab_size),
            jnp.asarray(stops, jnp.int32),
        )

    @classmethod
    def greedy(cls, vocab_size: int) -> "Draw":
        """The most probable token, and no token that ends a sequence."""
        stop_Z = jnp.full(_STOPS_PADDED_TO, NO_TOKEN, jnp.int32)
        return cls(None, None, None, jnp.int32(vocab_size), stop_Z)

    def stops(self, token_B: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether a token ends its sequence."""
        return jnp.any(token_B[:, None] == self.stop_Z, axis=1)


def sequence_keys(seed: int, prompts: Sequence[Int[np.ndarray, "_"]], samples: int) -> PRNGKeyArray:
    """A key for each sequence, those of a prompt side by side.

    Into a key go the seed, the prompt's tokens, and which of its samples a sequence is.  So a
    prompt gets the same text in any company, and different prompts are drawn independently.
    """
    checksums = [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts]
    checksum_B = jnp.asarray(np.repeat(np.array(checksums, np.uint32), samples))
    sample_B = jnp.asarray(np.tile(np.arange(samples, dtype=np.uint32), len(prompts)))
    of_prompt_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), checksum_B)
    return jax.vmap(jax.random.fold_in)(of_prompt_B, sample_B)


def draw_tokens(
    logits_BV: Float[Array, "B V"], draw: Draw, key_B: PRNGKeyArray | None, step: Int[Array, ""]
) -> Int[Array, "B"]:
    """The next token of each sequence: temperature, then top-k, then nucleus, then the draw.

    Args:
      logits_BV: of the next token.
      draw: how.
      key_B: of each sequence, see :func:`sequence_keys`; None where ``draw`` is greedy.
      step: which token of its sequence this is.
    """
    known_V = jnp.arange(logits_BV.shape[1]) < draw.vocab_size
    logits_BV = jnp.where(known_V, logits_BV, -jnp.inf)

    def drawn():
        kept_BV = logits_BV / draw.temperature
        kept_BV = _if(draw.top_k > 0, kept_BV, lambda x_BV: keep_top_k(x_BV, draw.top_k))
        kept_BV = _if(draw.nucleus < 1, kept_BV, lambda x_BV: keep_nucleus(x_BV, draw.nucleus))
        step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
        return pick(jax.nn.softmax(kept_BV, axis=-1), jax.vmap(jax.random.uniform)(step_key_B))

    greedy = lambda: jnp.argmax(logits_BV, axis=-1)  # noqa: E731
    if draw.temperature is None:
        return greedy().astype(jnp.int32)
    return jax.lax.cond(draw.temperature > 0, drawn, greedy).astype(jnp.int32)


def pick(probs_BV: Float[Array, "B V"], uniform_B: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token at which the cumulative probability passes a number from [0, 1).

    One random number a sequence: noise for every logit (the Gumbel trick) is a good part of a step
    of decoding (docs/measurements.md: cpu-gumbel-noise).  In two steps, blocks and then tokens, so
    that the sums that are accumulated are short.
    """
    batch, vocab = probs_BV.shape
    width = math.isqrt(vocab - 1) + 1
    probs_Bnw = jnp.pad(probs_BV, ((0, 0), (0, width * width - vocab)))
    probs_Bnw = probs_Bnw.reshape(batch, width, width)
    block_Bn = jnp.sum(probs_Bnw, axis=2)
    block_B, rest_B = _passed(block_Bn, uniform_B * jnp.sum(block_Bn, axis=1))
    chosen_Bw = jnp.take_along_axis(probs_Bnw, block_B[:, None, None], axis=1)[:, 0]
    return block_B * width + _passed(chosen_Bw, rest_B)[0]


def _passed(mass_Bn: Float[Array, "B n"], target_B: Float[Array, "B"]):
    """(where the cumulative mass passes the target, what of the target lies in there)."""
    until_Bn = jnp.cumsum(mass_Bn, axis=1)
    # Rounding may have put the target on the very end, behind the last mass that is not zero.
    target_B = jnp.minimum(target_B, jnp.nextafter(until_Bn[:, -1], 0.0))
    index_B1 = jnp.sum(until_Bn <= target_B[:, None], axis=1, keepdims=True)
    before_B1 = jnp.take_along_axis(until_Bn - mass_Bn, index_B1, axis=1)
    return index_B1[:, 0], jnp.maximum(target_B - before_B1[:, 0], 0.0)


def _if(wanted: Bool[Array, ""], x_BV: Array, change: Callable[[Array], Array]) -> Array:
    return jax.lax.cond(wanted, change, lambda x_BV: x_BV, x_BV)


def keep_top_k(logits_BV: Float[Array, "B V"], k: Int[Array, ""]) -> Float[Array, "B V"]:
    """-inf for all but the k largest of a row; equals of the last one stay too."""
    score_BV = _order(logits_BV)
    enough = lambda over_BV: jnp.sum(over_BV, axis=-1) >= k  # noqa: E731
    return _keep(logits_BV, score_BV, enough)


def keep_nucleus(logits_BV: Float[Array, "B V"], share: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf for all but the fewest most probable tokens that hold ``share`` (arXiv 1904.09751).

    The token that crosses the share is kept, and equals of the last one are too.
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    enough = lambda over_BV: jnp.sum(jnp.where(over_BV, probs_BV, 0.0), axis=-1) >= share  # noqa: E731
    return _keep(logits_BV, _order(logits_BV), enough)


def _order(x_BV: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the floats."""
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    negative_BV = bits_BV >> 31 == 1
    return jnp.where(negative_BV, ~bits_BV, bits_BV | jnp.uint32(1 << 31))


def _keep(logits_BV, score_BV, enough: Callable[[Array], Array]):
    """-inf where the score is below the highest threshold at which there is enough."""

    def try_bit(i, threshold_B1):
        higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> i)
        return jnp.where(enough(score_BV >= higher_B1)[:, None], higher_B1, threshold_B1)

    lowest_B1 = jnp.zeros((logits_BV.shape[0], 1), jnp.uint32)
    threshold_B1 = jax.lax.fori_loop(0, 32, try_bit, lowest_B1)
    return jnp.where(score_BV >= threshold_B1, logits_BV, -jnp.inf)
