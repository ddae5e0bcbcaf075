"""Number of parameters that a model has, and of those that one token uses.

Pure arithmetic over :func:`parameter_shapes`: nothing is allocated, so the count of a model of any
size takes next to no time (docs/measurements.md: start-parameter-count).
"""

import math

from dynmoe_jax import config
from dynmoe_jax.model.decoder import parameter_shapes


def count_parameters(model: config.Model) -> int:
    """All parameters: embeddings, norms and routers included."""
    return sum(_sizes(model).values())


def active_parameters(model: config.Model, experts_per_token: float) -> int:
    """The parameters that one token uses, given its mean number of experts per MoE layer.

    Of the experts it uses a share; of everything else all, routers and the whole embedding
    included.  Rounded where the mean is not a whole number.
    """
    sizes = _sizes(model)
    moe = model.moe
    names = moe.expert_kind.parameters(model.width, moe.num_experts, moe.hidden_width)
    experts = sum(size for path, size in sizes.items() if path[-1] in names)
    rest = sum(sizes.values()) - experts
    # A dense model has no experts, and no number of them either.
    return rest + (round(experts * experts_per_token / model.moe.num_experts) if experts else 0)


def _sizes(model: config.Model) -> dict[tuple, int]:
    return {path: math.prod(leaf.shape) for path, leaf in parameter_shapes(model).flat_state()}
