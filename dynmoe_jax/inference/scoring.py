"""How probable continuations are behind contexts that several of them share.

:func:`read_contexts` computes every context once; :func:`score` computes continuations behind its
cache, which it leaves as it is, so that it serves for any number of calls::

    contexts = read_contexts(structure, params, tokens_BP, start_B)
    for ending_BC, length_B in endings:
        scores = score(structure, params, contexts, ending_BC, length_B)

Several continuations of one context in one call: repeat it by :func:`repeat_contexts`.  Both
programs scan over the layers, so they compile in about a second at any depth; the sizes B, P and C
are compiled anew when they change, so round them up (:func:`.generate.rounded_up`).

Axis legend: B sequences, P slots of the contexts, C tokens of a continuation at most, V vocabulary,
N MoE layers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.model.cache import Cache, extend, read, repeated, stacked, with_room


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
    """Contexts that have been computed.

    Attributes:
      cache: their keys and values.
      log_probs_BV: of the token that follows each.
      experts_NBP: experts that each position used.
    """

    cache: Cache
    log_probs_BV: Float[Array, "B V"]
    experts_NBP: Int[Array, "N B P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """How probable continuations are; what stands behind their ends is 0 and False.

    Attributes:
      log_prob_BC: of each token, in nats.
      greedy_BC: whether each token is the most probable one.
      experts_NBC: experts that each token used.
    """

    log_prob_BC: Float[Array, "B C"]
    greedy_BC: Bool[Array, "B C"]
    experts_NBC: Int[Array, "N B C"]


@partial(jax.jit, static_argnames="structure")
def read_contexts(
    structure: nnx.GraphDef,
    params: nnx.State,
    tokens_BP: Int[Array, "B P"],
    start_B: Int[Array, "B"],
) -> Contexts:
    """Computes contexts.

    Args:
      structure: of a decoder.
      params: its parameters.
      tokens_BP: contexts of at least one token, filled up at the left.
      start_B: where each begins.
    """
    decoder = nnx.merge(structure, params)
    x_BPD, cache, experts_NBP = read(decoder, tokens_BP, start_B)
    log_probs_BV = jax.nn.log_softmax(decoder.logits(x_BPD[:, -1:])[:, 0])
    return Contexts(cache, log_probs_BV, experts_NBP)


def repeat_contexts(contexts: Contexts, times: int) -> Contexts:
    """Each context ``times`` times, side by side."""
    return Contexts(
        repeated(contexts.cache, times),
        jnp.repeat(contexts.log_probs_BV, times, axis=0),
        jnp.repeat(contexts.experts_NBP, times, axis=1),
    )


@partial(jax.jit, static_argnames="structure")
def score(
    structure: nnx.GraphDef,
    params: nnx.State,
    contexts: Contexts,
    tokens_BC: Int[Array, "B C"],
    length_B: Int[Array, "B"],
) -> Scores:
    """Scores one continuation of each context.

    Args:
      structure: of a decoder.
      params: its parameters.
      contexts: from :func:`read_contexts`; they stay valid.
      tokens_BC: continuations, filled up at the right.
      length_B: tokens of each.
    """
    decoder = nnx.merge(structure, params)
    slots = contexts.experts_NBP.shape[2] + tokens_BC.shape[1]
    valid_BC = jnp.arange(tokens_BC.shape[1]) < length_B[:, None]
    x_BCD, _, experts_NBC = extend(
        decoder, stacked(decoder), tokens_BC, valid_BC, with_room(contexts.cache, slots)
    )
    behind_BCV = jax.nn.log_softmax(decoder.logits(x_BCD[:, :-1]))
    log_probs_BCV = jnp.concatenate([contexts.log_probs_BV[:, None], behind_BCV], axis=1)
    log_prob_BC = jnp.take_along_axis(log_probs_BCV, tokens_BC[..., None], axis=2)[..., 0]
    greedy_BC = jnp.argmax(log_probs_BCV, axis=2) == tokens_BC
    return Scores(jnp.where(valid_BC, log_prob_BC, 0.0), greedy_BC & valid_BC, experts_NBC)
