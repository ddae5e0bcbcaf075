"""Stacks of a decoder: which layers lie in which, and under which name."""

import dataclasses
import functools

from dynmoe_jax import config
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.model.periods import Run, find_runs


@dataclasses.dataclass(frozen=True)
class Stack:
    """A run of layers whose parameters are stacked, and that is scanned.

    Attributes:
      name: of the attribute of the decoder, with which paths of its parameters begin.
      first: number of its first layer in the decoder.
      run: its layers.
    """

    name: str
    first: int
    run: Run[LayerSettings]

    def layers_at(self, place: int) -> range:
        """Numbers of the layers that stand at a place of the period, one of each repetition."""
        period = len(self.run.period)
        return range(self.first + place, self.first + period * self.run.repeats, period)


@functools.lru_cache(maxsize=256)
def stacks_of(model: config.Model) -> tuple[Stack, ...]:
    """The stacks of a model, in the order of computation.

    Equal dense layers before all others are ``first_groups``, the periods behind them ``groups``.
    Where ``config.model.layers`` makes layers differ, the stacks are ``stack_0``, ``stack_1``, …
    """
    layers = model.by_layer
    if model.layers:
        found, first = [], 0
        for i, run in enumerate(find_runs(layers)):
            found.append(Stack(f"stack_{i}", first, run))
            first += len(run.layers)
        return tuple(found)
    first, every = model.moe.dense_first_layers, model.moe.every_n_layers or 1
    groups = Stack("groups", first, Run(layers[first : first + every], model.num_groups))
    return (Stack("first_groups", 0, Run(layers[:1], first)), groups) if first else (groups,)
