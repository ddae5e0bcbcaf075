"""Fits of routers to what the experts of a split feed-forward would have given.

Which experts to choose is learned from pairs: inputs of the feed-forward, and for each how much of
the output every expert has.  All that has to be known of outputs is their products with each other.

Axis legend: S sampled tokens, E experts, D model width, F hidden units of an expert, P steps, B
tokens of a step.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.routing import Router
from dynmoe_jax.surgery.experts.descent import descended

Params = Mapping[str, Array]
"""Parameters of a router by name."""

_AT_ONCE = 256
"""Tokens whose outputs of all experts are there at one time."""

METHODS = ("scores", "labels")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Inputs of a feed-forward, and what its experts make of them.

    Attributes:
      input_SD: the normed stream, which the router reads too.
      score_SE: sum of the absolute hidden units of each expert; of a ReLU, of what is on.
      product_SEE: products of the outputs of any two experts.
    """

    input_SD: Float[np.ndarray, "S D"]
    score_SE: Float[np.ndarray, "S E"]
    product_SEE: Float[np.ndarray, "S E E"]

    def at(self, rows: Int[np.ndarray, "B"]) -> "Pairs":
        """Some of them."""
        return Pairs(self.input_SD[rows], self.score_SE[rows], self.product_SEE[rows])

    @property
    def norm_SE(self) -> Float[np.ndarray, "S E"]:
        """How long the output of each expert is."""
        return np.sqrt(np.maximum(np.einsum("see->se", self.product_SEE), 0.0))

    def distance_SE(self, k: int) -> Float[np.ndarray, "S E"]:
        """Squared distance of each expert's output to the share k / E of all (FactorLLM)."""
        share = k / self.score_SE.shape[1]
        own_SE = np.einsum("see->se", self.product_SEE)
        with_all_SE = self.product_SEE.sum(axis=2)
        return own_SE - 2 * share * with_all_SE + share**2 * with_all_SE.sum(axis=1, keepdims=True)

    def best(self, method: str, k: int) -> Bool[np.ndarray, "S E"]:
        """The k experts of each token that an oracle chooses."""
        return largest(self.score_SE if method == "scores" else -self.distance_SE(k), k)

    def targets(self, method: str, k: int) -> Float[np.ndarray, "S E"]:
        """Targets of a router: scores as shares of a token's largest, or labels 0 and 1."""
        if method == "labels":
            return self.best(method, k).astype(np.float32)
        most_S1 = self.score_SE.max(axis=1, keepdims=True)
        return self.score_SE / np.maximum(most_S1, 1e-30)

    def error(self, chosen_SE: Bool[np.ndarray, "S E"], scale: float) -> float:
        """Squared error of the output with chosen experts alone, as a share of the whole one's."""
        missing_SE = scale * chosen_SE - 1.0
        error_S = np.einsum("se,sef,sf->s", missing_SE, self.product_SEE, missing_SE)
        return float(error_S.sum() / max(self.product_SEE.sum(), 1e-30))


def largest(score_SE: Float[np.ndarray, "S E"], k: int) -> Bool[np.ndarray, "S E"]:
    """Whether an expert is among the k of the largest scores; of equal ones, the first."""
    order_SE = np.argsort(-np.asarray(score_SE), axis=1, kind="stable")
    chosen_SE = np.zeros(score_SE.shape, bool)
    np.put_along_axis(chosen_SE, order_SE[:, :k], True, axis=1)
    return chosen_SE


def pairs_of(kind: ExpertKind, weights: Mapping[str, np.ndarray], input_SD: np.ndarray) -> Pairs:
    """Computes all experts of a layer.

    Args:
      kind: of the experts.
      weights: arrays of all of them, by name.
      input_SD: sampled inputs.
    """
    pieces = np.array_split(input_SD, -(-len(input_SD) // _AT_ONCE))
    found = [jax.device_get(_computed(kind, dict(weights), piece)) for piece in pieces]
    return Pairs(input_SD, *(np.concatenate(part) for part in zip(*found, strict=True)))


@partial(jax.jit, static_argnums=0)
def _computed(kind, weights, x_BD):
    def of_expert(own):
        _, hidden_BF = kind.hidden(own, x_BD)
        return jnp.abs(hidden_BF).sum(axis=1), kind.output(own, hidden_BF)

    score_EB, output_EBD = jax.lax.map(of_expert, weights)
    return score_EB.T, jnp.einsum("ebd,fbd->bef", output_EBD, output_EBD)


def fitted(
    route: Router,
    params: Mapping[str, np.ndarray],
    pairs: Pairs,
    method: str,
    k: int,
    order_PB: Int[np.ndarray, "P B"],
    rate: float,
) -> dict[str, np.ndarray]:
    """Parameters of a router after Adam's steps.

    Args:
      route: the router.
      params: to begin with.
      pairs: which it learns from.
      method: ``"scores"``: cross-entropy of sigmoids (MoEfication); ``"labels"``: KL(router ||
        softmax of labels) (FactorLLM).
      k: experts of a token.
      order_PB: numbers of the pairs of each step.
      rate: learning rate.
    """
    targets_SE = pairs.targets(method, k).astype(np.float32)
    given = dict(params), pairs.input_SD, targets_SE, order_PB
    return jax.device_get(_descended(route, method, rate, *given))


def logits_of(route: Router, params: Mapping[str, Array], x_SD: Array) -> Float[Array, "S E"]:
    """The logits of a router with one matrix, or with its own function."""
    if route.logits is None:
        return x_SD @ params["router_DE"]
    return route.logits(params, x_SD, params["router_DE"].shape[1])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _descended(route, method, rate, params, input_SD, target_SE, order_PB):
    optimizer = optax.adam(rate)

    def loss(params, rows_B):
        logits_BE, target_BE = logits_of(route, params, input_SD[rows_B]), target_SE[rows_B]
        if method == "scores":
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits_BE, target_BE))
        log_p_BE, log_q_BE = jax.nn.log_softmax(logits_BE), jax.nn.log_softmax(target_BE)
        return jnp.mean(jnp.sum(jnp.exp(log_p_BE) * (log_p_BE - log_q_BE), axis=1))

    return descended(loss, optimizer, params, order_PB)
