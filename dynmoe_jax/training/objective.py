"""Objective that training minimises: sums over the tokens of a batch, and the loss made of them.

Sums add up over microbatches, so that the loss is that of the whole batch however it is cut.

Axis legend: B batch, L positions, N MoE layers, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.model import Decoder, LayerRouting
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.routing import losses

Batch = dict[str, Int[Array, "B L"]]
"""``tokens``, ``targets``, ``segment_ids`` (0 = padding) and ``positions``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingSums:
    """Counts over tokens, for metrics.

    Attributes:
      load_NE: tokens that chose each expert.
      dropped_N: rows dropped.
    """

    load_NE: Int[Array, "N E"]
    dropped_N: Int[Array, "N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """All that the loss and the metrics of a batch are made of; microbatches add up.

    Attributes:
      cross_entropy: over valid tokens, with the output z-loss in it.
      nll: negative log-likelihood of the targets, nats; no gradient.
      tokens: valid tokens, float32.
      routing: what the routing losses are made of, by layer; None in a dense model.
      counts: N = 0 in a dense model.
    """

    cross_entropy: Float[Array, ""]
    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    routing: losses.LossSums | None
    counts: RoutingSums


def batch_sums(decoder: Decoder, batch: Batch, loss: config.Loss) -> BatchSums:
    """The sums of one batch."""
    valid_BL = batch["segment_ids"] > 0
    x_BLD, routing = decoder.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    cross_entropy, nll_BL = cross_entropy_sums(
        x_BLD,
        decoder.output_DV,
        batch["targets"],
        valid_BL,
        z_weight=loss.z_weight,
        chunk_tokens=loss.chunk_tokens,
    )
    return BatchSums(
        cross_entropy=cross_entropy,
        nll=jnp.sum(nll_BL),
        tokens=jnp.sum(valid_BL, dtype=jnp.float32),
        routing=routing and losses.loss_sums(routing.by_layer, routing.valid_T),
        counts=_counts(routing),
    )


def _counts(routing: LayerRouting | None) -> RoutingSums:
    if routing is None:
        return RoutingSums(jnp.zeros((0, 1), jnp.int32), jnp.zeros(0, jnp.int32))
    return RoutingSums(routing.by_layer.load_E, routing.rows_dropped_N)


def loss_of(
    sums: BatchSums, loss: config.Loss
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(the loss, its parts by name).

    L = lm + balance_weight * balance + entropy_weight * entropy + router_z_weight * router_z, plus
    the output z-loss (Top-P paper, section 3.2).  Every term is a mean over the valid tokens; those
    of routing are averaged over layers.
    """
    divisor = jnp.maximum(sums.tokens, 1)
    parts = {"lm_loss": sums.nll / divisor} | _routing_losses(sums.routing, loss)
    total = (
        sums.cross_entropy / divisor
        + loss.balance_weight * parts["balance_loss"]
        + loss.entropy_weight * parts["entropy_loss"]
        + loss.router_z_weight * parts["router_z_loss"]
    )
    return total, parts | {"loss": total}


def _routing_losses(sums: losses.LossSums | None, loss: config.Loss) -> dict[str, Float[Array, ""]]:
    if sums is None:
        return dict.fromkeys(("balance_loss", "entropy_loss", "router_z_loss"), jnp.float32(0))
    by_layer = {
        "balance_loss": losses.balance_loss(sums, loss.balance_counts),
        "entropy_loss": losses.entropy_loss(sums),
        "router_z_loss": losses.router_z_loss(sums),
    }
    return {name: jnp.mean(value_N) for name, value_N in by_layer.items()}
