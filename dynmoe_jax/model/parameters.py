"""Number of parameters that a model has, and of those that one token uses.

Pure arithmetic over :func:`parameter_shapes`: nothing is allocated, so the count of a model of any
size takes next to no time (docs/measurements.md: start-parameter-count).
"""

import functools
import math
from collections.abc import Sequence

from dynmoe_jax import config
from dynmoe_jax.model.adjugate import adjugates_of, expected_adjugates
from dynmoe_jax.model.decoder import decoder_shapes, parameter_shapes


def count_parameters(model: config.Model) -> int:
    """All parameters: embeddings, norms and routers included."""
    return sum(_sizes(model).values())


def active_parameters(model: config.Model, experts_per_token: float | Sequence[float]) -> int:
    """The parameters that one token uses, given its mean number of experts per MoE layer.

    Of the experts of a layer it uses a share; of everything else all, routers and the whole
    embedding included.  Rounded where the mean is not a whole number.

    Args:
      model: the architecture.
      experts_per_token: one number for all MoE layers, or one for each.
    """
    mean_N = experts_per_token
    if not isinstance(mean_N, Sequence):
        mean_N = [experts_per_token] * model.num_moe_layers
    decoder = decoder_shapes(model)
    rest, used = count_parameters(model), 0.0
    for layer, numbers in zip(decoder.moe_feed_forwards, decoder.moe_layers, strict=True):
        moe = layer.moe
        names = moe.expert_kind.parameters(model.width, moe.num_experts, moe.hidden_width)
        size = sum(math.prod(getattr(layer, name).shape) for name in names)
        means = [mean_N[model.moe_layers.index(number)] for number in numbers]
        mean = means[0] if len(set(means)) == 1 else sum(means) / len(means)
        rest -= size
        used += size * mean / moe.num_experts
        if layer.adjugates is not None:
            narrow = layer.adjugates
            size = sum(math.prod(getattr(narrow, name).shape) for name in narrow.names)
            rest -= size
            used += size * expected_adjugates(moe, mean) / adjugates_of(moe)
    return rest + round(used)


# Kept, because one model is asked for several times.
@functools.lru_cache(maxsize=8)
def _sizes(model: config.Model) -> dict[tuple, int]:
    return {path: math.prod(leaf.shape) for path, leaf in parameter_shapes(model).flat_state()}
