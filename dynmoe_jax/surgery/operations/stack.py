"""Gstack: a deeper model of copies of a trained one's layers (arXiv 2405.15319)."""

import dataclasses
import math
from typing import ClassVar

from dynmoe_jax.edits.settings import plans_of, with_layers
from dynmoe_jax.fields import free_setting
from dynmoe_jax.surgery.operation import OPERATIONS, Operation


@OPERATIONS.register("stack")
@dataclasses.dataclass(frozen=True)
class Stack(Operation):
    """Repeats the layers of a model, all of them in turn or each by itself.

    Layer i of the result is layer ``i mod N`` of the parent, or, interleaved, ``i // times``.
    Everything else is kept.  It changes the function; the paper trains on from there.
    """

    times: int = free_setting(4, "copies of each layer (g)", low=2)
    interleaved: bool = free_setting(
        False, "copies of a layer follow each other, for comparison; otherwise all layers in turn"
    )
    paper: ClassVar = "Stacking Your Transformers, 2405.15319"

    def order(self, num_layers: int) -> list[int]:
        """The parent's layer of each layer of the result."""
        copies = range(num_layers * self.times)
        return [i // self.times if self.interleaved else i % num_layers for i in copies]

    def result(self, parents):
        """The parent's settings with more layers."""
        (cfg,) = parents
        plans = plans_of(cfg.model)
        return with_layers(cfg, [plans[i] for i in self.order(len(plans))])

    def array(self, place, given):
        """The array of the layer that this one is a copy of."""
        if place.layer is None:
            return given.read(place)
        layers = given.model.num_layers // self.times
        return given.read(place.at(self.order(layers)[place.layer]))


def growth_tokens(parameters: float, flops: float) -> float:
    """Tokens to train the small model on before it is stacked (d).

    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 (arXiv 2405.15319, equation 5).

    Args:
      parameters: of the result (N).
      flops: that training the result may take in all (C).
    """
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)
