"""Routers of a result: their settings, and arrays as a new model begins with.

Axis legend: D model width, E experts.
"""

import jax
import numpy as np

from dynmoe_jax import config
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import drawn
from dynmoe_jax.surgery.operation import Given


def layer_of(model: config.Model, place: Place) -> config.Model:
    """The settings of the layer that a place is in."""
    return model.by_layer[place.layer].model


def is_of_router(model: config.Model, place: Place) -> bool:
    """Whether an array is a parameter, or a state, of a router."""
    stem, _, name = place.name.rpartition(".")
    if place.layer is None or stem != "feed_forward" or not model.by_layer[place.layer].is_moe:
        return False
    layer = layer_of(model, place)
    return name in _parameters(layer) or name in _states(layer)


def new_array(place: Place, given: Given, std: float) -> np.ndarray:
    """An array of a router as a new model begins with; moments are zero.

    Args:
      place: where it stands.
      given: for the draws.
      std: standard deviation of what is drawn from a normal distribution.
    """
    layer, name = layer_of(given.model, place), place.array_name
    if name in (states := _states(layer)):
        return np.asarray(states[name])
    declared = _parameters(layer)[name]
    if declared.init == "normal":
        values = given.normal(place, std)
    elif declared.init in ("zeros", "ones"):
        values = getattr(np, declared.init)(given.shape, np.float32)
    else:
        key = jax.random.key(int(given.random(place).integers(2**31)))
        values = np.asarray(declared.init(key, given.shape), np.float32)
    return drawn(values, given.role)


def _parameters(layer: config.Model):
    return layer.moe.route.parameters(layer.width, layer.moe.num_experts)


def _states(layer: config.Model):
    return layer.moe.route.layer_state(layer.width, layer.moe.num_experts)
