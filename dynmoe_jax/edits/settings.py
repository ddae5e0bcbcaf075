"""Edits of settings: which layers have experts, and what single layers have of their own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.config.layers import FEED_FORWARD, own_values, written_layers
from dynmoe_jax.registry import OBJECTIVES, chosen


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer of a model that is to be.

    Attributes:
      is_moe: whether it has experts.
      own: settings of its own by dotted name below ``config.model``.
    """

    is_moe: bool
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def plans_of(model: config.Model) -> list[LayerPlan]:
    """The layers of a model, as plans."""
    return [
        LayerPlan(layer.is_moe, {name: own[name] for name in own if name != FEED_FORWARD})
        for layer, own in zip(model.by_layer, own_values(model), strict=True)
    ]


def edited(cfg: config.Config, changes: Mapping[str, Any]) -> config.Config:
    """Checked settings with other values, by dotted path, such as ``model.moe.router``.

    Groups of kinds that are not chosen any more go back to their defaults, and so does an objective
    that the new model cannot be trained by.

    Raises:
      ConfigError: a value is out of range, or contradicts another.
    """
    settings = config.to_dict(cfg)
    for path, value in changes.items():
        *groups, name = path.split(".")
        inner = settings
        for group in groups:
            inner = inner[group]
        inner[name] = value
    asked, default = cfg.train.objective, config.Train().objective
    if asked in OBJECTIVES and asked != default:
        train = settings["train"]
        defaults = {"objective": default, asked: config.to_dict(config.Config())["train"][asked]}
        made = config.from_stored({**settings, "train": {**train, **defaults}})
        if chosen(cfg.train, "objective").obstacle(made.model):
            return made
    return config.from_stored(settings)


def with_layers(
    cfg: config.Config, plans: Sequence[LayerPlan], changes: Mapping[str, Any] | None = None
) -> config.Config:
    """Settings of a model with these layers, in the shortest notation there is.

    Args:
      cfg: of a model; whatever is not of single layers stays.
      plans: its layers.
      changes: of other settings, by dotted path below ``config.model``.

    Raises:
      ConfigError: as :func:`edited`.
    """
    first, every, offset = _pattern([plan.is_moe for plan in plans])
    regular = every is not None
    own = [
        dict(plan.own) | ({} if regular or plan.is_moe else {FEED_FORWARD: "dense"})
        for plan in plans
    ]
    found = {
        "model.num_layers": len(plans),
        "model.layers": written_layers(own),
        "model.moe.dense_first_layers": first,
        "model.moe.every_n_layers": every if regular else 1,
        "model.moe.layer_offset": offset,
    }
    found |= {f"model.{name}": value for name, value in (changes or {}).items()}
    return edited(cfg, found)


def _pattern(is_moe: Sequence[bool]) -> tuple[int, int | None, int]:
    """(dense layers first, n of every n-th, offset) that describe which layers have experts; n is
    None if none do."""
    if not any(is_moe):
        return 0, 0, 0
    count = len(is_moe)
    for every in range(1, count + 1):
        for first in range(count):
            if (count - first) % every:
                continue
            for offset in range(every):
                if [i in range(first + offset, count, every) for i in range(count)] == list(is_moe):
                    return first, every, offset
    return 0, None, 0
