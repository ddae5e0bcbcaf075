"""States of routers after an applied update.

Axis legend: N MoE layers of one router, n layers that are computed by one program.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.output import by_program, in_layer_order
from dynmoe_jax.routing import Router


def with_next_states(
    structure: nnx.GraphDef, params: nnx.State, measured: Sequence[Any]
) -> tuple[nnx.State, nnx.State | None]:
    """(variables with the routers' next states, which parameters were revised).

    All layers of one router are told together: a budget may be over all of them.

    Args:
      structure: of the decoder.
      params: its variables.
      measured: sums of the routers, in the order of ``Decoder.moe_layers``.

    Returns:
      the variables; a tree like them of bools, True for the numbers of parameters that the router
      has revised, whose moments are then 0; None if no router revises any.
    """
    # Copies of the variables, which are written to below.
    decoder = nnx.merge(structure, jax.tree.map(lambda x: x, params))
    revised: dict[tuple[int, str], Any] = {}
    feed_forwards, numbers = decoder.moe_feed_forwards, decoder.moe_layers
    for members in _by_router(feed_forwards):
        router = feed_forwards[members[0]].router
        layers, of_members = [feed_forwards[i] for i in members], [numbers[i] for i in members]
        names = (*layers[0].router_names, *layers[0].state_names)
        values = [{name: getattr(layer, name)[...] for name in names} for layer in layers]
        values_N = in_layer_order(values, of_members)
        params_N = {name: values_N[name] for name in layers[0].router_names}
        state_N = {name: values_N[name] for name in layers[0].state_names}
        seen_N = in_layer_order([measured[i] for i in members], of_members)
        state_N, new_params = router.next_state(params_N, state_N, seen_N)
        for name, value_N in {**state_N, **(new_params or {})}.items():
            for i, value in zip(members, by_program(value_N, of_members), strict=True):
                variable = getattr(feed_forwards[i], name)
                if name in params_N:
                    revised[i, name] = value != variable[...]
                variable[...] = value
    variables = nnx.state(decoder)
    if not revised:
        return variables, None
    marks = jax.tree.map(lambda _: False, variables)
    marked = nnx.merge(structure, marks)
    for (i, name), mark in revised.items():
        getattr(marked.moe_feed_forwards[i], name).set_value(mark)
    return variables, nnx.state(marked)


def shown_states(structure: nnx.GraphDef, params: nnx.State) -> dict[str, Float[Array, "N"]]:
    """Numbers of the routers' states that people see, by name, one for each MoE layer.

    NaN where the router of a layer has no number of that name.
    """
    decoder = nnx.merge(structure, params)
    parts = []
    for layer in decoder.moe_feed_forwards:
        state = {name: getattr(layer, name)[...] for name in layer.state_names}
        # Without a state there is nothing that a layer of it could be told from another by.
        parts.append(jax.vmap(layer.router.shown)(state) if state else {})
    layers = decoder.moe_layers
    nothing = [jnp.full(len(numbers), jnp.nan) for numbers in layers]
    return {
        name: in_layer_order(
            [part.get(name, none) for part, none in zip(parts, nothing, strict=True)], layers
        )
        for name in sorted({name for part in parts for name in part})
    }


def _by_router(feed_forwards: Sequence[MoEFeedForward]) -> list[list[int]]:
    """Numbers of the feed-forwards whose router has something to do after an update, those of one
    router and number of experts together."""
    groups: dict[Any, list[int]] = {}
    for i, layer in enumerate(feed_forwards):
        own = type(layer.router).next_state is not Router.next_state
        if layer.state_names or own:
            groups.setdefault((layer.router, layer.moe.num_experts), []).append(i)
    return list(groups.values())
