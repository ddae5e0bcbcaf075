"""Routing losses of a run: which are computed, what each weighs, and who says so.

Axis legend: N MoE layers, E experts, n layers that are computed by one program.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.output import LayerSums, in_layer_order, padded
from dynmoe_jax.registry import all_kinds, chosen
from dynmoe_jax.routing.controllers import Controller, LayerCounts
from dynmoe_jax.routing.losses import RoutingLoss, coefficients, moves

Controllers = dict[str, dict[str, Array]]
"""States of controllers, by the name of the loss."""


@dataclasses.dataclass(frozen=True)
class RoutingLosses:
    """Routing losses of a run.

    Attributes:
      losses: (name, loss) of those that are computed.
      weights: the coefficient of each in the MoE layers, in order; 0: it is logged alone.
      controllers: (name, controller) of losses whose coefficient moves.
      layers: numbers of the MoE layers, those together that are computed by one program.
      expected: experts per token that their routers aim at, likewise.
    """

    losses: tuple[tuple[str, RoutingLoss], ...]
    weights: Mapping[str, tuple[float, ...]]
    controllers: Mapping[str, Controller]
    layers: Sequence[Sequence[int]]
    expected: Sequence[float]

    @classmethod
    def of(cls, cfg: config.Config, decoder: Decoder) -> "RoutingLosses":
        """The losses that settings ask for in a model."""
        expected = [
            layer.router.bounds(layer.moe.num_experts).expected
            for layer in decoder.moe_feed_forwards
        ]
        kinds = all_kinds(cfg.loss)
        weights = coefficients(kinds, [moe.route for moe in cfg.model.moe_settings])
        losses = tuple((name, kinds[name]) for name in weights)
        controllers = {name: chosen(loss, "controller") for name, loss in losses if loss.controller}
        return cls(losses, weights, controllers, decoder.moe_layers, expected)

    @property
    def additive(self) -> bool:
        """Whether the loss of the batch is the mean of those of its microbatches."""
        return all(loss.additive for name, loss in self.losses if moves(loss, self.weights[name]))

    def initial(self) -> Controllers:
        """States of the controllers before the first step."""
        count = sum(map(len, self.layers))
        return {
            name: controller.initial(max(self.weights[name]), count)
            for name, controller in self.controllers.items()
        }

    def coefficients(
        self, states: Controllers, step: Int[Array, ""]
    ) -> dict[str, Float[Array, "*N"] | float]:
        """The coefficient of every loss at a step: a number, or one for each layer."""
        found = {}
        for name, weights in self.weights.items():
            # One number where all layers have the same.
            found[name] = weights[0] if len(set(weights)) == 1 else jnp.array(weights)
            if name in self.controllers:
                now = self.controllers[name].coefficient(max(weights), states[name], step)
                of_N = np.array([bool(weight) for weight in weights])
                found[name] = now if of_N.all() or not of_N.any() else jnp.where(of_N, now, 0.0)
        return found

    def values(
        self, sums: Sequence[LayerSums], tokens: Float[Array, ""]
    ) -> dict[str, Float[Array, "N"]]:
        """Every loss of every layer, by name.

        Args:
          sums: of the layers that are computed by one program, with a leading axis n.
          tokens: valid tokens, at least 1.
        """

        def value(name, loss, each):
            if name in each.losses:
                return loss.value(each.losses[name], tokens)
            return jnp.zeros(each.load_E.shape[0])  # its router does not give what the loss needs

        return {
            name: in_layer_order([value(name, loss, each) for each in sums], self.layers)
            for name, loss in self.losses
        }

    def update(self, states: Controllers, counts: LayerCounts) -> Controllers:
        """The states after an applied update."""
        return {
            name: controller.update(states[name], counts)
            for name, controller in self.controllers.items()
        }


def weighed(
    values: Mapping[str, Float[Array, "N"]],
    coefficients: Mapping[str, Float[Array, "*N"] | float],
) -> Float[Array, ""]:
    """The sum of all losses, each weighed in its layer and averaged over layers."""
    total = jnp.float32(0)
    for name, value_N in values.items():
        coefficient = coefficients[name]
        if jnp.ndim(coefficient):
            total += jnp.mean(coefficient * value_N)
        else:
            total += coefficient * jnp.mean(value_N)
    return total


def layer_counts(
    sums: Sequence[LayerSums],
    dropped: Sequence[Int[Array, "n"]],
    tokens: Float[Array, ""],
    expected: Sequence[float],
    layers: Sequence[Sequence[int]],
) -> LayerCounts:
    """Counts of all layers in their order, padded to the most experts of one.

    Args:
      sums: of the layers that are computed by one program.
      dropped: likewise.
      tokens: valid tokens.
      expected: experts per token that routers aim at, likewise.
      layers: numbers of the layers.
    """
    if not sums:
        none = jnp.zeros((0, 1), jnp.int32)
        return LayerCounts(none, none > 0, none[:, 0], jnp.zeros(0), tokens)
    loads = [each.load_E for each in sums]
    exists = [jnp.ones(load.shape, bool) for load in loads]
    return LayerCounts(
        in_layer_order(padded(loads), layers),
        in_layer_order(padded(exists), layers),
        in_layer_order(dropped, layers),
        in_layer_order(
            [jnp.full(len(n), e) for e, n in zip(expected, layers, strict=True)], layers
        ),
        tokens,
    )
