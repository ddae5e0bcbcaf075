"""State of a run whose model grows: parameters, moments and controllers among new ones.

Axis legend: N MoE layers.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from dynmoe_jax import config
from dynmoe_jax.edits.growth import Growing, is_of_router
from dynmoe_jax.edits.places import Place, stored_in
from dynmoe_jax.model.masks import MASK_NAMES
from dynmoe_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    moments_of,
    with_all_moments,
)
from dynmoe_jax.training.step import TrainState, init_state


def grown(
    before: config.Config, after: config.Config, step: int, state: TrainState, shapes: TrainState
) -> TrainState:
    """The state of the larger model that computes what the small one does.

    New weights are drawn from the run's seed and the step, so a run that goes on there draws the
    same.  Their masks and moments are 0; whatever counts steps or updates goes on.

    Args:
      before: settings of the run with its small model.
      after: the same with the larger one.
      step: steps done.
      state: of the small model.
      shapes: of the state of the larger one, and how it lies on the devices.
    """
    placed = jax.tree.map(lambda x: x.sharding, shapes)
    grow = jax.jit(partial(_grown, before, after), out_shardings=placed)
    return grow(state, jax.random.fold_in(jax.random.key(after.seed), step))


def _grown(
    before: config.Config, after: config.Config, state: TrainState, key: PRNGKeyArray
) -> TrainState:
    optimizer = make_optimizer(after.optimizer, make_schedule(after.optimizer, after.train.steps))
    fresh = init_state(after, optimizer, key)
    growing = Growing(before.model, after.model)
    old, new = moments_of(state.optimizer), moments_of(fresh.optimizer)
    moments = old._replace(
        first=_variables(growing, old.first, new.first, has_history=True),
        second=_variables(growing, old.second, new.second, has_history=True),
    )
    return dataclasses.replace(
        state,
        params=_variables(growing, state.params, fresh.params),
        optimizer=with_all_moments(state.optimizer, moments),
        controllers=_of_moe_layers(growing, state.controllers),
    )


def _variables(
    growing: Growing, old: nnx.State, fresh: nnx.State, has_history: bool = False
) -> nnx.State:
    """Variables of the larger model, or moments of them, which begin at 0."""
    arrays = dict(_by_place(growing.before, old))
    leaves, stored = [], {each.path: each for each, _ in stored_in(growing.after)}
    for path, variable in fresh.flat_state():
        values, layers = variable[...], stored[path].layers
        made = [
            _array(growing, Place(layer, stored[path].name), arrays, own, has_history)
            for layer, own in (zip(layers, values, strict=True) if layers else [(None, values)])
        ]
        leaves.append((path, variable.replace(jnp.stack(made) if layers else made[0])))
    return nnx.from_flat_state(leaves)


def _by_place(model: config.Model, variables: nnx.State) -> Iterator[tuple[Place, Array]]:
    """Yields the arrays of every layer, and those outside of all, experts together."""
    stored = {each.path: each for each, _ in stored_in(model)}
    for path, variable in variables.flat_state():
        layers, values = stored[path].layers, variable[...]
        for layer, own in zip(layers, values, strict=True) if layers else [(None, values)]:
            yield Place(layer, stored[path].name), own


def _array(
    growing: Growing, place: Place, arrays: dict[Place, Array], fresh: Array, has_history: bool
) -> Array:
    layer, is_copy = growing.source(place.layer)
    old = arrays[place.at(layer)]
    if is_copy and (has_history or place.array_name == "layer_mask"):
        return jnp.zeros_like(fresh)
    if has_history or place.array_name in MASK_NAMES or is_of_router(growing.after, place):
        fresh = jnp.zeros_like(fresh)
    return growing.array(place, old, fresh)


def _of_moe_layers(growing: Growing, states: Any) -> Any:
    """States of controllers; a new layer has that of the layer that it is a copy of."""
    before, after = growing.before.moe_layers, growing.after.moe_layers
    index_N = jnp.array([before.index(growing.source(layer)[0]) for layer in after], int)

    def of_leaf(path, leaf):
        return leaf[index_N] if str(getattr(path[-1], "key", "")).endswith("_N") else leaf

    return jax.tree.map_with_path(of_leaf, states)
