"""Which layers have experts: lists of foreign configurations, and our repeating groups."""

import itertools

from dynmoe_jax import config
from dynmoe_jax.interop.errors import CheckpointError


def moe_layers(model: config.Model) -> list[int]:
    """The layers of a model that have experts."""
    return list(model.moe_layers)


def grouping(layers: list[int], num_layers: int) -> dict[str, int]:
    """The settings of :class:`config.MoE` that put experts into the given layers.

    Args:
      layers: those with experts, rising.
      num_layers: of the model.

    Raises:
      CheckpointError: they do not repeat; our layers are groups of the same make.
    """
    if not layers:
        return {"every_n_layers": 0}
    for first, every in itertools.product(range(num_layers), range(1, num_layers + 1)):
        if (num_layers - first) % every:
            continue
        start = layers[0]
        fits = first <= start < first + every and layers == list(range(start, num_layers, every))
        if fits:
            return {
                "every_n_layers": every,
                "layer_offset": start - first,
                "dense_first_layers": first,
            }
    raise CheckpointError(
        f"config.json gives experts to the layers {layers} of {num_layers}, which do not repeat; "
        "dense layers first and then one of every n can be read."
    )
