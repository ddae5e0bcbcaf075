"""A run's model with the state of its router written as settings, which a format can say.

Axis legend: N MoE layers.
"""

import dataclasses

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.model import variable_shapes
from dynmoe_jax.model.components import RouterState
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import OpenedRun


def with_frozen_router(run: OpenedRun) -> config.Model:
    """The model of a run whose router keeps nothing that its settings could say.

    Layers that differ are left as they are: no format has them.

    Raises:
      CheckpointError: the layers' states differ, where the settings are the same for all.
    """
    model = run.config.model
    state_N = {} if model.layers else _states(run)
    if not state_N:
        return model
    router = model.moe.route.frozen(state_N)
    if router is None:
        raise CheckpointError(
            f"no format of Hugging Face's has such a model, whose config.model.moe.router="
            f"{model.moe.router!r} has come to another state ({', '.join(state_N)}) in some layers "
            "than in others; export one whose layers share it."
        )
    moe = dataclasses.replace(model.moe, **{model.moe.router: router})
    return dataclasses.replace(model, moe=moe)


def _states(run: OpenedRun) -> dict[str, np.ndarray]:
    """States of the router by name, of all layers: these lie in one stack, since none differs."""
    found = {}
    for path, leaf in variable_shapes(run.config.model).flat_state():
        if isinstance(leaf, RouterState):
            found[path[-1]] = run.read(path)
    return found
