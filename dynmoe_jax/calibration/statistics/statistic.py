"""Interface of statistics: numbers of a layer that operations on models ask for.

A statistic is one file and the line that registers it: names, shapes, the price of gathering it and
the file that it is kept in follow.

Axis legend: S sampled tokens, D model width, E experts, X scores of a router, F hidden width, H
query heads, W head width.
"""

import abc
from typing import ClassVar

from jaxtyping import Array

from dynmoe_jax.calibration.seen import SeenLayer, SeenRows
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.registry import Registry

STATISTICS = Registry("statistic")


class Statistic(abc.ABC):
    """A statistic: a frozen dataclass.

    Attributes:
      axes: letters of the axes of a layer's array.
      form: ``"sum"`` over tokens, ``"mean"`` over them, or ``"sample"``: of S of them, the same in
        every layer.
      needs: ``"gradients"`` of the loss, by a second sweep from the top down, or nothing.
    """

    axes: ClassVar[str]
    form: ClassVar[str] = "mean"
    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def exists(self, layer: LayerSettings) -> bool:
        """Whether such a layer has it."""

    def axes_in(self, layer: LayerSettings) -> str:
        """Letters of the axes of the array of such a layer."""
        return self.axes

    def shape(self, layer: LayerSettings, samples: int) -> tuple[int, ...]:
        """Shape of the array of such a layer."""
        return tuple(sizes_of(layer, samples)[letter] for letter in self.axes_in(layer))

    def flops(self, layer: LayerSettings) -> float:
        """FLOPs of a token in such a layer, beside those of what it needs."""
        return 0.0


class LayerStatistic(Statistic):
    """A statistic of what goes into and out of a layer's attention or feed-forward."""

    @abc.abstractmethod
    def of_layer(self, seen: SeenLayer) -> Array:
        """Sums over the valid tokens of a batch, or its sampled tokens, one after another."""


class UnitStatistic(Statistic):
    """A statistic of hidden units: of a dense feed-forward, or of each expert (axis E in front)."""

    def exists(self, layer):
        """Holds wherever the kind of feed-forward says what its hidden units are."""
        return kind_of(layer).hidden is not None

    def axes_in(self, layer):
        """Puts an E in front where there are experts."""
        return "E" * layer.is_moe + self.axes

    def flops_per_row(self, width: int, hidden_width: int) -> float:
        """FLOPs of one row."""
        return 2.0 * hidden_width

    def flops(self, layer):
        """Counts the rows that the router is expected to choose."""
        sizes = sizes_of(layer, 0)
        return rows_per_token(layer) * self.flops_per_row(sizes["D"], sizes["F"])

    @abc.abstractmethod
    def of_rows(self, rows: SeenRows) -> Array:
        """Sums over the valid rows."""


def sizes_of(layer: LayerSettings, samples: int) -> dict[str, int]:
    """Sizes of axes by their letters."""
    model, moe = layer.model, layer.model.moe
    sizes = {"D": model.width, "F": model.hidden_width, "S": samples}
    sizes |= {"H": model.num_heads, "W": model.head_width}
    if layer.is_moe:
        sizes |= {"E": moe.num_experts, "F": moe.hidden_width}
        sizes["X"] = moe.num_experts + moe.route.free_experts
    return sizes


def kind_of(layer: LayerSettings):
    """The kind of a layer's experts, or of its dense feed-forward."""
    return layer.model.moe.expert_kind if layer.is_moe else layer.model.feed_forward_kind


def rows_per_token(layer: LayerSettings) -> float:
    """Rows that a token is expected to have in a layer's feed-forward."""
    moe = layer.model.moe
    return moe.route.bounds(moe.num_experts).expected if layer.is_moe else 1.0


def registered(name: str) -> Statistic:
    """The statistic of that name."""
    return STATISTICS[name]()
