"""Masked Structural Growth: a larger model that computes what a small one does (arXiv 2305.02869).

Axis legend: D model width, F hidden width, H query heads.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.config.growth import SIZES, larger
from dynmoe_jax.edits.growth import Growing, blank, is_of_router, mask_shapes
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.fields import AUTO, ConfigError, free_setting
from dynmoe_jax.model.masks import MASK_NAMES
from dynmoe_jax.surgery.operation import OPERATIONS, Given, Operation

_SIZES = ("width", "hidden_width", "expert_width", "shared_width")
_SIZES += ("num_heads", "num_kv_heads", "num_layers")
_NAMES = {"expert_width": "moe.hidden_width", "shared_width": "moe.shared_hidden_width"}
"""Settings of the model that settings of the operation have another name than."""


def _size(what: str, unit: str = "units"):
    return free_setting(0, f"{what} of the result; 0 = as it is", unit=unit, low=0)


@OPERATIONS.register("grow")
@dataclasses.dataclass(frozen=True)
class Grow(Operation):
    """Makes a model wider and deeper, with masks that rise from 0 while it is trained on.

    What is new does nothing while its mask is 0, whatever its weights are.  New layers are copies
    of those before them.  Training raises all masks once per update, to 1 after ``mask_steps``.
    """

    width: int = _size("width")
    hidden_width: int = _size("hidden width of dense feed-forwards")
    expert_width: int = _size("hidden width of an expert")
    shared_width: int = _size("hidden width of the shared expert")
    num_heads: int = _size("query heads", "heads")
    num_kv_heads: int = free_setting(
        0, "key/value heads of the result; 0 = in proportion to query heads", unit="heads", low=0
    )
    num_layers: int = _size("layers", "layers")
    mask_steps: int = free_setting(
        100, "updates in which masks rise from 0 to 1", unit="updates", low=1
    )
    init_std: float = free_setting(
        AUTO, "standard deviation of new weights; auto = the model's", low=0.0, auto=True
    )
    paper: ClassVar = "Masked Structural Growth, 2305.02869"
    exact: ClassVar = "yes, until masks rise"
    takes_masks: ClassVar = True

    def promise(self, parents):
        """1e-5, because units and layers that are masked by 0 add nothing."""
        return 1e-5

    def result(self, parents):
        """The parent's settings with larger sizes, and masks."""
        (cfg,) = parents
        asked = {_NAMES.get(name, name): getattr(self, name) for name in _SIZES}
        try:
            model = larger(cfg.model, {name: size for name, size in asked.items() if size})
        except ConfigError as error:
            raise ConfigError(f"--from cannot grow so: {error}") from error
        if model == cfg.model:
            raise ConfigError(
                "nothing of --from grows; name a larger size, such as "
                f"--width={2 * cfg.model.width}."
            )
        sizes = {name: value for name, _, value in config.walk(model) if name in SIZES}
        changes = {f"model.{name}": value for name, value in sizes.items()}
        return edited(cfg, changes | {"model.mask_steps": self.mask_steps})

    def remarks(self, parents):
        """Nothing is seen of growth before it is trained."""
        return [
            f"Masks of what is new are 0, and rise to 1 in {self.mask_steps} updates of a training "
            "that begins with the result; until then it cannot be exported."
        ]

    def array(self, place, given):
        """The parent's array, in the places of what was there."""
        growing = Growing(given.parents[0], given.model)
        layer, is_copy = growing.source(place.layer)
        source = place.at(layer)
        if place.array_name in MASK_NAMES:
            old = self._mask(source, growing.before, given)
            if place.array_name == "layer_mask":
                return np.zeros_like(old) if is_copy else old
            return growing.array(place, old, np.zeros(given.shape, np.float32))
        if is_copy and given.role is not Role.PARAMETER:
            return np.zeros(given.shape, np.float32)
        return growing.array(place, given.read(source), self._fresh(place, given))

    def _mask(self, source: Place, before: config.Model, given: Given) -> np.ndarray:
        """A mask of the parent; it may have none, and then all of it is there."""
        if before.mask_steps:
            return given.read(source)
        shapes = given.once("masks", lambda: mask_shapes(before))
        return np.ones(shapes[source], np.float32)

    def _fresh(self, place: Place, given: Given) -> np.ndarray:
        """An array of which entries are taken that the parent does not have."""
        if given.role is not Role.PARAMETER or is_of_router(given.model, place):
            return np.zeros(given.shape, np.float32)
        std = given.model.init_std if self.init_std == AUTO else self.init_std
        return blank(place.array_name, given.shape, given.normal(place, std))
