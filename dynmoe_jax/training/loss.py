"""Loss of a batch: the objective's value and the routing losses, made of sums over tokens.

Sums add up over microbatches, so that the loss is that of the whole batch however it is cut.

Axis legend: B batch, L positions, N MoE layers, E experts, n layers computed by one program.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.inputs import NoiseKey, TrainingInput
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.model.output import LayerSums, in_layer_order
from dynmoe_jax.registry import chosen
from dynmoe_jax.routing.controllers import LayerCounts
from dynmoe_jax.training.objectives import Batch, Objective
from dynmoe_jax.training.objectives.objective import valid
from dynmoe_jax.training.routing_losses import RoutingLosses, layer_counts, weighed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """All that the loss and the metrics of a batch are made of; microbatches add up.

    Attributes:
      objective: sums of the objective.
      tokens: valid tokens, float32.
      layers: sums of the MoE layers, those together that are computed by one program.
      dropped: (token, expert) pairs left out, likewise.
    """

    objective: Mapping[str, Array]
    tokens: Float[Array, ""]
    layers: list[LayerSums]
    dropped: list[Int[Array, "n"]]


def _sums_of_layer(
    output: LayerOutput,
) -> tuple[LayerSums, Int[Array, ""]] | Mapping[str, Array] | None:
    """(sums, pairs dropped) of an MoE layer; sums over activations of a dense one, if any."""
    return output.activations if output.moe is None else (output.moe.sums, output.moe.dropped)


def _of_sequences(
    parts: Sequence[Mapping[str, Array]], layers: Sequence[Sequence[int]]
) -> Mapping[str, Float[Array, "N"]]:
    """Sums over activations of all dense layers in their order, those of sequences added up."""
    if not parts:
        return {}
    return jax.tree.map(lambda x_NB: jnp.sum(x_NB, axis=1), in_layer_order(parts, layers))


@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    """The loss of a run.

    Attributes:
      objective: what is minimised over the text.
      routing: the routing losses.
      settings: of the loss.
    """

    objective: Objective
    routing: RoutingLosses
    settings: config.Loss

    @classmethod
    def of(
        cls, cfg: config.Config, decoder: Decoder, objective: Objective | None = None
    ) -> "TrainingLoss":
        """The loss that the settings ask for; ``objective`` is theirs, prepared for a tokenizer."""
        objective = objective or chosen(cfg.train, "objective")
        return cls(objective, RoutingLosses.of(cfg, decoder), cfg.loss)

    @property
    def additive(self) -> bool:
        """Whether the loss of the batch is the mean of those of its microbatches."""
        return self.objective.additive and self.routing.additive

    def sums(self, decoder: Decoder, batch: Batch, key: NoiseKey | None = None) -> BatchSums:
        """The sums of a batch.

        Args:
          decoder: the model.
          batch: the batch; with ``row``, [B], where it is a part of one.
          key: of the step's noise, see :func:`~dynmoe_jax.model.inputs.noise_key`.
        """
        rows_B = batch.get("row", jnp.arange(batch["tokens"].shape[0]))
        x_BLD, tapped = decoder.tapped(
            batch["tokens"],
            batch["segment_ids"],
            batch["positions"],
            _sums_of_layer,
            TrainingInput(
                self.routing.losses, key, rows_B, activation_sums=self.objective.activation_sums
            ),
        )
        dense = [found for found in tapped if isinstance(found, Mapping)]
        tapped = [found for found in tapped if isinstance(found, tuple)]
        return BatchSums(
            objective={
                **self.objective.sums(decoder, x_BLD, batch, self.settings),
                **_of_sequences(dense, decoder.dense_layers),
            },
            tokens=jnp.sum(valid(batch), dtype=jnp.float32),
            # Axes are layers, devices, and those of each sum.
            layers=jax.tree.map(lambda x: jnp.sum(x, axis=1), [sums for sums, _ in tapped]),
            dropped=[dropped for _, dropped in tapped],
        )

    def value(
        self,
        sums: BatchSums,
        coefficients: Mapping[str, Any],
        shares: tuple[Array | float, Array | float] = (1.0, 1.0),
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """(the loss, its parts by name).

        L = objective + sum over the routing losses of coefficient * loss (Top-P paper, section
        3.2), each the mean over layers of a mean over tokens.

        Args:
          sums: of the batch.
          coefficients: of the routing losses, by name.
          shares: of these sums in what the objective and the routing losses are means over, where
            they are a part of the batch; everything is multiplied by its share.
        """
        of_objective, of_tokens = shares
        tokens = jnp.maximum(sums.tokens, 1)
        value, parts = self.objective.value(sums.objective)
        by_layer = self.routing.values(sums.layers, tokens)
        by_layer = {name: of_tokens * value_N for name, value_N in by_layer.items()}
        total = of_objective * value + weighed(by_layer, coefficients)
        parts = {name: of_objective * part for name, part in parts.items()}
        means = {f"{name}_loss": jnp.mean(value_N) for name, value_N in by_layer.items()}
        return total, parts | means | {"loss": total}

    def counts(self, sums: BatchSums) -> LayerCounts:
        """Counts of the MoE layers of a batch."""
        routing = self.routing
        return layer_counts(
            sums.layers, sums.dropped, sums.tokens, routing.expected, routing.layers
        )
