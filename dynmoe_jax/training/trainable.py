"""Parameters that are differentiated and have moments (``config.train.trainable``).

Groups have the names that fine-tuning of mixtures asks for: ST-MoE (arXiv 2202.08906) trains all
parameters, the experts alone or all but them; Flan-MoE (arXiv 2305.14705) freezes the router, the
experts, or what is neither.
"""

import re
from collections.abc import Callable

from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.config.parameter_groups import GROUPS, NOT
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.model.components import RouterState

Path = tuple[str | int, ...]
"""Path of a variable in the state of a decoder."""


def split_trainable(params: nnx.State, cfg: config.Config) -> tuple[nnx.State, nnx.State]:
    """(trainable parameters, all other variables) of a model; :func:`nnx.merge_state` joins them.

    Args:
      params: all variables of a model.
      cfg: all settings.

    Raises:
      ConfigError: ``config.train.trainable`` is no regular expression, or finds no parameter.
    """
    asked = cfg.train.trainable
    found = _finder(asked, cfg.model)

    def is_parameter(path, variable):
        return issubclass(variable.type, nnx.Param)

    parameters, _ = nnx.split_state(params, is_parameter, ...)
    hits = {path for path, _ in parameters.flat_state() if found(path)}
    if asked and not hits:
        names = sorted({".".join(map(str, path)) for path, _ in parameters.flat_state()})
        raise config.ConfigError(
            f"config.train.trainable={asked!r} finds no parameter; name groups ("
            f"{', '.join(GROUPS)}), or a part of a name: there are {', '.join(names)}."
        )
    but = asked.startswith(NOT)
    trained, rest = nnx.split_state(
        params, lambda path, v: is_parameter(path, v) and (path in hits) != but, ...
    )
    if not trained:
        raise config.ConfigError(f"config.train.trainable={asked!r} leaves no parameter to train.")
    return trained, rest


def without_frozen_changes(params: nnx.State, before: nnx.State, cfg: config.Config) -> nnx.State:
    """Variables after an update, in which everything frozen is what it was.

    A router without a trainable parameter keeps its state too, such as a bias or a threshold; one
    that has no parameters keeps moving it.

    Args:
      params: variables with the next states of routers.
      before: variables before the update.
      cfg: all settings.
    """
    trained, rest = split_trainable(before, cfg)
    moving = {path for path, _ in trained.flat_state()}
    names, _ = _declared(cfg.model)
    routers: dict[Path, bool] = {}
    for path, _ in before.flat_state():
        if path[-1] in names:
            routers[path[:-1]] = routers.get(path[:-1], False) or path in moving

    def stays(path, variable):
        if issubclass(variable.type, RouterState):
            return not routers.get(path[:-1], True)
        return True

    return nnx.merge_state(params, nnx.split_state(rest, stays, ...)[0])


def _group_of(path: Path, routers: frozenset[str], experts: frozenset[str]) -> str:
    """Name of the group of a parameter, by what routers and experts declare, and by its axes."""
    name = str(path[-1])
    if "feed_forward" in path:
        # The gate of a shared expert is a router of one.
        if name in routers or name.startswith("shared_router"):
            return "router"
        return "experts" if name in experts else "dense"
    if "attention" in path:
        return "attention"
    return "vocabulary" if "V" in axes_of(name) else "norms"


def _declared(model: config.Model) -> tuple[frozenset[str], frozenset[str]]:
    """(names of all routers' parameters, of all experts' parameters) in a model."""
    routers: set[str] = set()
    experts: set[str] = set()
    for moe in model.moe_settings:
        routers |= moe.route.parameters(model.width, moe.num_experts).keys()
        experts |= moe.expert_kind.parameters(model.width, moe.num_experts, 1).keys()
    return frozenset(routers), frozenset(experts)


def _finder(asked: str, model: config.Model) -> Callable[[Path], bool]:
    """Test of paths: whether groups, or a regular expression, find one; ``not:`` left away."""
    names = asked.removeprefix(NOT)
    groups = {name.strip() for name in names.split(",")}
    if groups <= set(GROUPS):
        routers, experts = _declared(model)
        return lambda path: _group_of(path, routers, experts) in groups
    try:
        wanted = re.compile(names)
    except re.error as error:
        raise config.ConfigError(
            f"config.train.trainable={asked!r} is no regular expression: {error}."
        ) from error
    return lambda path: wanted.search(".".join(map(str, path))) is not None
