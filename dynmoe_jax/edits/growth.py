"""Edits that make a model larger, by the letters of axes: what was there, among what is new.

Surgery grows models array by array, in numpy, and training whole states, under ``jit``.

Axis legend: D model width, F hidden width, H query heads, G key/value heads.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.edits.arrays import has_axis, size_of, take
from dynmoe_jax.edits.places import Place, stored_in
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.model.masks import Mask

GROWS = ("D", "F", "H", "G")
"""Letters of axes that may grow."""

NEW = -1
"""Stands in place of the number of an old entry where there is none."""


@dataclasses.dataclass(frozen=True)
class Growing:
    """A model and the larger one that it becomes.

    Attributes:
      before: the model.
      after: the larger one.
    """

    before: config.Model
    after: config.Model

    def source(self, layer: int | None) -> tuple[int | None, bool]:
        """(layer that a layer of the larger model comes from, whether it is new, a copy of that).

        Each old layer, or period of them where every n-th has experts, is followed by its copies,
        as many as evenly as can be.
        """
        if layer is None or layer < (first := self.before.moe.dense_first_layers):
            return layer, False
        every = self.before.moe.every_n_layers or 1
        old, new = ((m.num_layers - first) // every for m in (self.before, self.after))
        period, place = divmod(layer - first, every)
        source = period * old // new
        is_copy = period > 0 and (period - 1) * old // new == source
        return first + source * every + place, is_copy

    def array(self, place: Place, old: Any, fresh: Any) -> Any:
        """An array of the larger model, with one of the old model in it.

        Args:
          place: in the larger model.
          old: the array of the layer that it comes from; of numpy or JAX, with any axes in front.
          fresh: an array of the larger model, of which entries are taken that are new.
        """
        name, array, known = _named(place), old, None
        for letter in filter(partial(has_axis, name), GROWS):
            sizes = (size_of(x, name, letter) for x in (old, fresh))
            index = self._index(place, letter, *sizes)
            if np.array_equal(index, np.arange(size_of(old, name, letter))):
                continue
            array = take(array, name, letter, np.maximum(index, 0))
            along = _along(name, letter, index != NEW)
            known = along if known is None else known & along
        if known is None:
            return array
        return array.__array_namespace__().where(known, array, fresh)

    def _index(self, place: Place, letter: str, old: int, new: int) -> np.ndarray:
        """The old entry that stands at each place of an axis, or NEW.

        Query heads that share keys stay together: those that a group gains stand behind its own.
        """
        share = wider = 1
        if letter == "H" and place.name.startswith("attention."):
            layer, _ = self.source(place.layer)
            share = _heads_of_group(self.before.by_layer[layer].model)
            wider = _heads_of_group(self.after.by_layer[place.layer].model)
        group, member = np.divmod(np.arange(new), wider)
        found = group * share + member
        return np.where((member < share) & (found < old), found, NEW)


def _heads_of_group(model: config.Model) -> int:
    return model.num_heads // model.num_kv_heads


def _named(place: Place) -> str:
    """The name of an array with all its axes, which scales of norms leave out."""
    is_scale = place.name.endswith("norm.scale")
    return f"{place.array_name}_D" if is_scale else place.array_name


def blank(name: str, shape: tuple[int, ...], drawn: Any) -> Any:
    """The new entries of a parameter, in an array of its larger shape: matrices are drawn, scales
    are 1, and biases 0.

    Args:
      name: of the array, with its axes.
      shape: of it.
      drawn: what a matrix gets.
    """
    if "scale" in name:
        return np.ones(shape, np.float32)
    is_matrix = len(axes_of(name)) > 1 and "bias" not in name
    return drawn if is_matrix else np.zeros(shape, np.float32)


def is_of_router(model: config.Model, place: Place) -> bool:
    """Whether an array is a router's; its new entries are 0.

    Some routers look at the length of what they compare with.
    """
    if place.layer is None or not model.by_layer[place.layer].is_moe:
        return False
    own = model.by_layer[place.layer].model
    route, experts = own.moe.route, own.moe.num_experts
    names = (*route.parameters(own.width, experts), *route.layer_state(own.width, experts))
    return place.name in [f"feed_forward.{name}" for name in names]


def mask_shapes(model: config.Model) -> dict[Place, tuple[int, ...]]:
    """Shapes of the masks that a model has, or would have, by their places."""
    masked = dataclasses.replace(model, mask_steps=model.mask_steps or 1)
    return {
        place: stored.shape[stored.leading :]
        for stored, leaf in stored_in(masked)
        if isinstance(leaf, Mask)
        for place in stored.places()
    }


def _along(name: str, letter: str, known: np.ndarray) -> np.ndarray:
    """Which entries are old, in a shape that fits the array's own axes."""
    axes = axes_of(name)
    place = [axis.lstrip("2") for axis in axes].index(letter)
    halves = 2 if axes[place].startswith("2") else 1
    shape = [1] * len(axes)
    shape[place] = halves * len(known)
    return np.tile(known, halves).reshape(shape)
