"""Models whose experts are parts of dense feed-forwards: what fits of their routers share.

Axis legend: S sampled tokens, P steps, B tokens of a step.
"""

import numpy as np
from jaxtyping import Int

from dynmoe_jax import config
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.routing.routers.threshold import Threshold
from dynmoe_jax.routing.routers.top_k import TopK
from dynmoe_jax.surgery.operation import Given

INPUTS = "ffn_input_samples"
"""Statistic that routers are fitted to: what router and experts read."""

_KEPT_BACK = 0.25
"""Share of the samples that errors are measured on, and nothing is learned from."""


def check_split(model: config.Model, with_threshold: bool = False) -> None:
    """Raises ConfigError for a model that was not split, or whose router is none of these.

    Args:
      model: its settings.
      with_threshold: its router may be a threshold as well.
    """
    if len({(moe.num_experts, moe.route) for moe in model.moe_settings}) > 1:
        raise ConfigError(
            f"config.model.layers={model.layers!r} gives layers of --from different numbers of "
            "experts, or routers; name a model that split made."
        )
    for number in model.moe_layers or (0,):
        layer = model.by_layer[number]
        moe = layer.model.moe
        ones = isinstance(moe.route, TopK) and moe.route.straight_through
        if layer.is_moe and (ones or (with_threshold and isinstance(moe.route, Threshold))):
            if moe.expert_kind.hidden is None:
                raise ConfigError(
                    f"config.model.moe.experts={moe.experts} of layer {number} does not say what "
                    "its hidden units are, of which experts are scored."
                )
            continue
        raise ConfigError(
            f"Layer {number} of --from has no experts that top-k weighs by 1; name a model that "
            "split made, with --gates=ones."
        )


def all_on(cfg: config.Config) -> config.Config:
    """Settings with which all experts are on, as in the model before it was split."""
    moe = cfg.model.moe
    if isinstance(moe.route, Threshold):
        rule = {"rule": "largest", "sense": "paper", "tau": 0.0, "k": Threshold().k}
        changes = {f"threshold.{name}": value for name, value in rule.items()}
    else:
        changes = {"top_k.k": moe.num_experts}
    changes["routed_scale"] = 1.0
    return edited(cfg, {f"model.moe.{name}": value for name, value in changes.items()})


def uses_all(moe: config.MoE) -> bool:
    """Whether every token uses every expert of such a layer."""
    bounds = moe.route.bounds(moe.num_experts)
    return bounds.fewest == moe.num_experts


def expert_arrays(layer: int, given: Given) -> dict[str, np.ndarray]:
    """Arrays of all experts of a layer, by name."""
    moe = given.model.by_layer[layer].model.moe
    return {
        name: np.stack(
            [
                given.read(Place(layer, f"feed_forward.{name}", expert))
                for expert in range(moe.num_experts)
            ]
        )
        for name in moe.expert_kind.parameters(1, 1, 1)
    }


def kept_and_learned(count: int, random: np.random.Generator) -> list[Int[np.ndarray, "S"]]:
    """Numbers of the samples that errors are measured on, and of those that are learned from."""
    order_S = random.permutation(count)
    return np.split(order_S, [max(1, round(_KEPT_BACK * count))])


def order_of_steps(
    count: int, batch_size: int, epochs: int, random: np.random.Generator
) -> Int[np.ndarray, "P B"]:
    """Numbers of the samples of each step, of so many; each is learned from once in an epoch."""
    size = min(batch_size, count)
    orders = [random.permutation(count)[: count // size * size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, size)
