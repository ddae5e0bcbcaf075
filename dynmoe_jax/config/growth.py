"""Settings of a model that grows: ``config.train.grow`` says what becomes larger, and when.

Parts are separated by semicolons; each names a step and what is larger from the next step on::

    500:width=256,num_heads=8;800:num_layers=6

So the model of a step follows from the settings and the step alone: a checkpoint of step 500 holds
the small one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from dynmoe_jax.fields import ConfigError, nearest, walk

SIZES = (
    "width",
    "hidden_width",
    "num_heads",
    "num_kv_heads",
    "num_layers",
    "moe.hidden_width",
    "moe.shared_hidden_width",
)
"""Settings of a model that may grow."""

_EXAMPLE = "'500:width=256;800:num_layers=6'"


@dataclasses.dataclass(frozen=True)
class Growth:
    """A growth of a run's model.

    Attributes:
      step: steps that are done when the model grows.
      sizes: of the model from then on, by name in :data:`SIZES`.
    """

    step: int
    sizes: Mapping[str, int]


def growths(train: Any) -> tuple[Growth, ...]:
    """The growths that ``config.train.grow`` names, in their order.

    Raises:
      ConfigError: it is not written as it should be, or names a step that does not come.
    """
    return _growths(train.grow, train.steps)


def growth_steps(train: Any) -> tuple[int, ...]:
    """The steps after which the model of a run grows."""
    return tuple(growth.step for growth in growths(train))


def model_at(config: Any, step: int) -> Any:
    """The model that computes a step, and that the checkpoint of the step holds.

    Args:
      config: a whole :class:`dynmoe_jax.config.Config`, as the run began.
      step: from 1.
    """
    model = config.model
    for growth in growths(config.train):
        if growth.step < step:
            model = larger(model, growth.sizes)
    return model


def settings_at(config: Any, step: int) -> Any:
    """The settings of a run whose model is that of a step; it does not grow any more."""
    if not config.train.grow:
        return config
    train = dataclasses.replace(config.train, grow="")
    return dataclasses.replace(config, model=model_at(config, step), train=train)


def larger(model: Any, sizes: Mapping[str, int]) -> Any:
    """A model with larger sizes, by name in :data:`SIZES`.

    Key/value heads grow in proportion to query heads, unless they are named.

    Raises:
      ConfigError: a size would shrink, heads do not divide, or layers that differ become more.
    """
    before = {name: value for name, _, value in walk(model) if name in SIZES}
    _check_effect(model, sizes)
    for name, size in sizes.items():
        if size < before[name]:
            raise ConfigError(f"{name}={size} is less than {before[name]}; a model only grows.")
    found = before | dict(sizes)
    if "num_kv_heads" not in sizes:
        heads = found["num_heads"] * before["num_kv_heads"]
        if heads % before["num_heads"]:
            raise ConfigError(
                f"num_heads={found['num_heads']} leaves no whole number of key/value heads in "
                f"proportion to {before['num_kv_heads']} of {before['num_heads']}; choose a "
                "multiple, or name num_kv_heads too."
            )
        found["num_kv_heads"] = heads // before["num_heads"]
    fixed = next((router for router in model.routers if not router.grows), None)
    if fixed and found["width"] > before["width"]:
        raise ConfigError(
            f"width={found['width']} changes what the router {model.moe.router!r} computes, which "
            "takes means over the width; grow a model with another router, or leave the width."
        )
    if model.layers and found["num_layers"] > before["num_layers"]:
        raise ConfigError(
            f"num_layers={found['num_layers']} cannot be had while config.model.layers="
            f"{model.layers!r} makes layers differ; grow a model whose layers are equal."
        )
    moe = {name.removeprefix("moe."): found.pop(name) for name in SIZES if name.startswith("moe.")}
    result = dataclasses.replace(model, **found, moe=dataclasses.replace(model.moe, **moe))
    _check_groups(model, result)
    if model.layers:  # they may have heads of their own, and are as many as before
        for layer, own in enumerate(zip(model.by_layer, result.by_layer, strict=True)):
            _check_groups(*(each.model for each in own), where=f" of layer {layer}")
    return result


def _check_groups(before: Any, after: Any, where: str = "") -> None:
    """Raises ConfigError where query heads would lose those that share their keys."""
    (old, rest), (new, more) = (
        divmod(model.num_heads, model.num_kv_heads) for model in (before, after)
    )
    if rest or more or new < old:
        raise ConfigError(
            f"num_heads={after.num_heads} with num_kv_heads={after.num_kv_heads}{where} does not "
            f"keep at least {old} query heads for each of key/value heads; choose a multiple of "
            f"{old * after.num_kv_heads}."
        )


def _check_effect(model: Any, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for a size that no layer has."""
    moe = [layer.model.moe for layer in model.by_layer if layer.is_moe]
    read = {
        "hidden_width": len(moe) < model.num_layers,
        "moe.hidden_width": bool(moe),
        "moe.shared_hidden_width": any(each.shared_hidden_width for each in moe),
    }
    for name in sizes:
        if not read.get(name, True):
            raise ConfigError(f"{name}={sizes[name]} is of nothing that a layer of it has.")


@functools.lru_cache(maxsize=64)
def _growths(text: str, steps: int) -> tuple[Growth, ...]:
    found: list[Growth] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        where, colon, what = (piece.strip() for piece in part.partition(":"))
        if not (colon and where.isdecimal()):
            raise _wrong(
                text,
                f"has the part {part!r}, which is not written STEP:NAME=SIZE; write it as in "
                f"{_EXAMPLE}",
            )
        step = int(where)
        if not 1 <= step < steps:
            raise _wrong(
                text,
                f"names step {step}, and steps of the run that another one follows are 1 to "
                f"{steps - 1} (config.train.steps={steps})",
            )
        if found and step <= found[-1].step:
            raise _wrong(
                text,
                f"names step {step} after step {found[-1].step}; name rising ones, each once",
            )
        found.append(Growth(step, _sizes(text, what)))
    return tuple(found)


def _sizes(text: str, what: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for assignment in what.split(","):
        name, equals, value = (piece.strip() for piece in assignment.partition("="))
        if not (name and equals and value):
            raise _wrong(text, f"has {assignment!r} where NAME=SIZE belongs, as in {_EXAMPLE}")
        if name not in SIZES:
            raise _wrong(
                text,
                f"names {name!r}, which cannot grow; write {nearest(name, SIZES)} if you mean "
                f"that, or one of {', '.join(SIZES)}",
            )
        if name in sizes:
            raise _wrong(text, f"names {name} twice for one step; leave one of them out")
        if not value.isdecimal() or not int(value):
            raise _wrong(text, f"says {name}={value}; a size is a whole number, at least 1")
        sizes[name] = int(value)
    return sizes


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"config.train.grow={text!r} {why}.")
