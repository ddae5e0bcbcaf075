"""Operations that fit the routers of a split model, and leave everything else as it was."""

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from dynmoe_jax.edits.roles import drawn
from dynmoe_jax.fields import free_setting
from dynmoe_jax.surgery.experts.routers import is_of_router
from dynmoe_jax.surgery.experts.split_models import INPUTS, all_on, uses_all
from dynmoe_jax.surgery.operation import Given, Operation, Wanted


@dataclasses.dataclass(frozen=True)
class FittedRouters(Operation):
    """An operation whose routers learn from inputs of the feed-forwards while all experts are on,
    that is of the dense model."""

    pairs: int = free_setting(
        8192, "tokens that are learned from, a quarter of them to measure on", unit="tokens", low=8
    )
    epochs: int = free_setting(30, "times that each is learned from", low=1)
    batch_size: int = free_setting(512, "tokens of a step", unit="tokens", low=1)
    exact: ClassVar = "with all experts on"
    statistics: ClassVar = frozenset({INPUTS})

    def wanted(self, parents):
        """Inputs of the feed-forwards, with all experts on."""
        (cfg,) = parents
        names, layers = self.statistics, cfg.model.moe_layers
        return Wanted(names, layers, samples=self.pairs, model=all_on(cfg).model)

    def promise(self, parents):
        """1e-5 where all experts were on, and stay on."""
        before = parents[0].model
        after = self.result(parents).model
        on = all(uses_all(moe) for model in (before, after) for moe in model.moe_settings)
        return 1e-5 if on and before.moe.routed_scale == after.moe.routed_scale else None

    def array(self, place, given):
        """A fitted router, and everything else as it was."""
        if not is_of_router(given.model, place):
            return given.read(place)
        params = given.once(
            ("router", place.layer), lambda: self.fitted_router(place.layer, given.parameters())
        )
        return drawn(params[place.array_name], given.role)

    @abc.abstractmethod
    def fitted_router(self, layer: int, given: Given) -> dict[str, np.ndarray]:
        """Parameters of the router of a layer; what it is worth goes to the findings."""
