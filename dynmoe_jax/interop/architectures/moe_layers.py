"""MoE layers by number: lists of foreign configurations, and our repeating groups."""

from dynmoe_jax import config
from dynmoe_jax.runs.errors import CheckpointError


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
    start = layers[0]
    # One layer alone may be the only one of groups of any size that reach to the end.
    sizes = range(num_layers - start, num_layers + 1) if len(layers) == 1 else [layers[1] - start]
    fitting = []
    for every in sizes:
        first = start - (start - num_layers) % every
        if first >= 0 and layers == list(range(start, num_layers, every)):
            fitting.append((first, every))
    if fitting:
        first, every = min(fitting)
        return {
            "every_n_layers": every,
            "layer_offset": start - first,
            "dense_first_layers": first,
        }
    raise CheckpointError(
        f"config.json gives experts to the layers {layers} of {num_layers}, which do not repeat; "
        "dense layers first and then one of every n can be read."
    )
