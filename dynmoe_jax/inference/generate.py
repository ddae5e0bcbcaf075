"""Sampling a continuation.

The whole prefix is computed anew for every token, at one static length: right for the short sample
that closes a run, and the reference for a decoder with a key/value cache.

Axis legend: L positions (prompt and continuation), N MoE layers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax.target import current_target

TILE = 128
"""Positions that Splash takes at the least; the other kernels divide it."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What was sampled after a prompt.

    Attributes:
      ids: token ids, the end-of-text token (if it came) not included.
      experts: mean number of experts, over the MoE layers, that the model used at the position
        from which each token was predicted; empty in a dense model.
    """

    ids: np.ndarray
    experts: np.ndarray


def generate(
    structure: nnx.GraphDef,
    params: nnx.State,
    prompt: np.ndarray,
    new_tokens: int,
    *,
    temperature: float,
    seed: int,
    eos_id: int,
    vocab_size: int,
) -> Continuation:
    """Continues ``prompt`` by up to ``new_tokens`` tokens.

    Args:
      structure: of a decoder (:func:`flax.nnx.graphdef`).
      params: its parameters.
      prompt: token ids, at least one.
      new_tokens: tokens to sample.
      temperature: logits are divided by it; 0 is greedy.
      seed: of the draws.
      eos_id: the token at which the continuation ends.
      vocab_size: the tokenizer's; a model may have more rows, which mean nothing.
    """
    end = len(prompt) + new_tokens
    tokens_L = np.zeros(positions_for(end, current_target().platform), np.int32)
    tokens_L[: len(prompt)] = prompt
    key = jax.random.key(seed)
    tokens_L, experts_L = _fill(
        structure,
        params,
        jnp.asarray(tokens_L),
        len(prompt),
        end,
        jnp.float32(temperature),
        key,
        vocab_size,
    )
    ids = np.asarray(tokens_L)[len(prompt) : end]
    experts = np.asarray(experts_L)[len(prompt) : end]
    ended = np.flatnonzero(ids == eos_id)
    end = ended[0] if ended.size else len(ids)
    return Continuation(ids[:end], experts[:end] if np.all(np.isfinite(experts)) else experts[:0])


def positions_for(end: int, platform: str) -> int:
    """L, how many positions to compute for a text of ``end``; those behind it are padding.

    Kernels of accelerators want whole tiles: an attention kernel that was asked for by name would
    otherwise refuse the sample after it has trained the run.
    """
    return end if platform == "cpu" else -(-end // TILE) * TILE


@partial(jax.jit, static_argnums=0)
def _fill(structure, params, tokens_L, start, end, temperature, key, vocab_size):
    """Fills positions ``start`` to ``end`` of tokens_L; also returns the experts behind each."""
    decoder = nnx.merge(structure, params)

    def fill(position, carry):
        tokens_L, experts_L = carry
        # What is not yet written is padding: it uses no experts, and causality hides it.
        segments_1L = (jnp.arange(tokens_L.size) < position).astype(jnp.int32)[None]
        output = decoder(tokens_L[None], segments_1L)
        logits_V = output.logits[0, position - 1]
        logits_V = jnp.where(jnp.arange(logits_V.size) < vocab_size, logits_V, -jnp.inf)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, position), logits_V / jnp.maximum(temperature, 1e-6)
        )
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))
        experts = jnp.nan
        if output.routing is not None:
            experts = jnp.mean(output.routing.experts_per_token[:, 0, position - 1])
        return tokens_L.at[position].set(token), experts_L.at[position].set(experts)

    empty_L = jnp.zeros(tokens_L.size, jnp.float32)
    return jax.lax.fori_loop(start, end, fill, (tokens_L, empty_L))
