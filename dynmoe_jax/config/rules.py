"""Checks between settings: those that need more than one."""

import dataclasses
import itertools
from typing import Any

from dynmoe_jax.config.growth import growths, settings_at
from dynmoe_jax.fields import AUTO, ConfigError, idle_settings, shown, walk
from dynmoe_jax.registry import (
    CORRUPTIONS,
    EXPERTS,
    LINEARS,
    OBJECTIVES,
    all_kinds,
    chosen,
    idle_kinds,
    names_in,
)
from dynmoe_jax.routing.losses import coefficients, moves
from dynmoe_jax.routing.router import OUTPUTS


def check_together(config: Any) -> None:
    """Raises ConfigError if settings, each allowed by itself, contradict each other.

    Args:
      config: a whole :class:`dynmoe_jax.config.Config`.
    """
    model, train = config.model, config.train
    _check_heads(model)
    _check_moe(model)
    _check_linear(model)
    _check_plain(model)
    _check_masks(model)
    _check_layers(model)
    _check_idle(config, "config.")
    _check_effects(config, "config.")
    _check_losses(config)
    _check_objective(config)
    if train.batch_size % train.microbatches:
        raise ConfigError(
            f"config.train.microbatches={train.microbatches} must divide "
            f"config.train.batch_size={train.batch_size}."
        )
    _check_mesh(config.mesh)
    _check_checkpoints(config)
    _check_text(config)
    if not train.init_from:  # else the model is that of the folder, and is checked when it is read
        check_begun(config)


def check_begun(config: Any) -> None:
    """Raises ConfigError where settings do not fit the model that a run begins with.

    Args:
      config: a whole :class:`dynmoe_jax.config.Config`, as the run begins.
    """
    model = config.model
    if config.data.seq_len > model.max_seq_len:
        raise ConfigError(
            f"config.data.seq_len={config.data.seq_len} must be at most "
            f"config.model.max_seq_len={model.max_seq_len}; raise the latter."
        )
    _check_growth(config)


def _check_text(config: Any) -> None:
    """Raises ConfigError for a corruption of text that cannot be."""
    data, objective = config.data, config.train.objective
    # The kinds are registered by rooms above this one.
    if data.corruption in CORRUPTIONS:
        if obstacle := chosen(data, "corruption").obstacle():
            raise ConfigError(f"config.data.{data.corruption}.{obstacle}.")
        if objective in OBJECTIVES and OBJECTIVES[objective].arrays:
            raise ConfigError(
                f"config.data.corruption={data.corruption!r} moves the text that "
                f"config.train.objective={objective!r} looks for; leave one of them out."
            )


def _check_heads(model: Any) -> None:
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"config.model.num_kv_heads={model.num_kv_heads} must divide "
            f"config.model.num_heads={model.num_heads}."
        )
    if model.head_width % 2:
        raise ConfigError(f"config.model.head_width={model.head_width} must be even, for RoPE.")


def _check_layers(model: Any) -> None:
    """Raises ConfigError for a layer whose own settings contradict each other."""
    if not model.layers:
        return
    first = {layer: i for i, layer in reversed(list(enumerate(model.by_layer)))}
    for layer, i in first.items():
        try:
            _check_heads(layer.model)
            if layer.is_moe:
                _check_experts(layer.model.moe)
        except ConfigError as error:
            raise ConfigError(
                f"config.model.layers={model.layers!r} does not fit layer {i}: {error}"
            ) from error


def _check_mesh(mesh: Any) -> None:
    sizes = {axis: getattr(mesh, axis) for axis in ("slice", "data", "expert", "model")}
    for axis, size in sizes.items():
        if size == 0:
            raise ConfigError(
                f"config.mesh.{axis}=0 must be at least 1, or -1 for what the other axes leave."
            )
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(
            f"config.mesh.{rest[0]}=-1 and config.mesh.{rest[1]}=-1 cannot both take what is left; "
            "give one of them a number."
        )


def _check_moe(model: Any) -> None:
    moe, first = model.moe, model.moe.dense_first_layers
    if first >= model.num_layers or (first and not moe.every_n_layers):
        raise ConfigError(
            f"config.model.moe.dense_first_layers={first} leaves no MoE layer of "
            f"config.model.num_layers={model.num_layers} with "
            f"config.model.moe.every_n_layers={moe.every_n_layers}; set it to 0."
        )
    if moe.every_n_layers and (model.num_layers - first) % moe.every_n_layers:
        less = f" less config.model.moe.dense_first_layers={first}" if first else ""
        raise ConfigError(
            f"config.model.moe.every_n_layers={moe.every_n_layers} must divide "
            f"config.model.num_layers={model.num_layers}{less}."
        )
    if moe.layer_offset and moe.layer_offset >= moe.every_n_layers:
        raise ConfigError(
            f"config.model.moe.layer_offset={moe.layer_offset} must be less than "
            f"config.model.moe.every_n_layers={moe.every_n_layers}."
        )
    if moe.every_n_layers and not model.layers:  # of layers that differ each is checked
        _check_experts(moe)
    _check_shared(moe)


def _check_experts(moe: Any) -> None:
    if obstacle := moe.route.obstacle(moe.num_experts):
        raise ConfigError(f"config.model.moe.{moe.router}.{obstacle}.")
    fewest = moe.route.bounds(moe.num_experts).fewest
    named = zip(names_in(moe.regularizers), chosen(moe, "regularizers"), strict=True)
    for name, regularizer in named:
        if obstacle := regularizer.obstacle(moe.num_experts, fewest):
            raise ConfigError(f"config.model.moe.{name}.{obstacle}.")
    _check_shared(moe)
    _check_chosen(moe)
    _check_adjugates(moe)


def _check_chosen(moe: Any) -> None:
    for name, off in (("transforms", ""), ("adjugate_width", 0)):
        if (value := getattr(moe, name)) and not moe.route.chooses:
            raise ConfigError(
                f"config.model.moe.{name}={value!r} needs experts that are chosen, and "
                f"config.model.moe.router={moe.router!r} mixes all; leave it at {off!r}."
            )


def _check_adjugates(moe: Any) -> None:
    if moe.adjugate_width and moe.num_experts % moe.adjugate_group:
        raise ConfigError(
            f"config.model.moe.adjugate_group={moe.adjugate_group} must divide "
            f"config.model.moe.num_experts={moe.num_experts}."
        )


def _check_shared(moe: Any) -> None:
    if moe.shared_gate and not moe.shared_hidden_width:
        raise ConfigError(
            "config.model.moe.shared_gate=True has no shared expert to weigh; set "
            "config.model.moe.shared_hidden_width."
        )


def _check_linear(model: Any) -> None:
    # The kinds are registered by a room above this one.
    if model.linear in LINEARS and (obstacle := chosen(model, "linear").obstacle()):
        raise ConfigError(f"config.model.{model.linear}.{obstacle}.")


def _check_objective(config: Any) -> None:
    # Registered by a room above this one, too.
    train = config.train
    if train.objective in OBJECTIVES and (
        obstacle := chosen(train, "objective").obstacle(config.model)
    ):
        raise ConfigError(f"config.train.objective={train.objective!r} {obstacle}.")


PLAIN = {"attention": "xla", "moe.grouped_product": "blocks"}
"""Settings that name a kernel, and the name that is plain JAX."""


def _check_plain(model: Any) -> None:
    """Raises ConfigError for a kernel that is named while there shall be none."""
    found = {path: value for path, _, value in walk(model)}
    for path, plain in PLAIN.items() if model.kernels == "plain" else ():
        if found[path] not in ("auto", plain):
            raise ConfigError(
                f"config.model.{path}={found[path]!r} names a kernel, and config.model.kernels="
                f"'plain' allows none; set one of them to 'auto'."
            )


def _check_masks(model: Any) -> None:
    """Raises ConfigError for parts of a model that no mask reaches."""
    if not model.mask_steps:
        return
    if model.linear != "dense":
        raise ConfigError(
            f"config.model.mask_steps={model.mask_steps} needs plain matrices, and config.model."
            f"linear={model.linear!r} stands for them; set one of them back to its default."
        )
    kinds = {"moe.experts": model.moe, "activation": model} if model.moe.every_n_layers else {}
    for name, group in (kinds or {"activation": model}).items():
        kind = getattr(group, name.rpartition(".")[2])
        if kind not in EXPERTS:  # registered by a room above this one
            continue
        declared = chosen(group, name.rpartition(".")[2]).parameters(2, 1, 2)
        if not any(parameter.endswith("FD") for parameter in declared):
            raise ConfigError(
                f"config.model.mask_steps={model.mask_steps} needs a matrix behind the hidden "
                f"units, and config.model.{name}={kind!r} has none whose name ends in FD; set "
                "mask_steps to 0."
            )


def _check_growth(config: Any) -> None:
    """Raises ConfigError where ``config.train.grow`` does not fit the model."""
    grow = config.train.grow
    if grow and not config.model.mask_steps:
        raise ConfigError(
            f"config.train.grow={grow!r} needs masks, or what is new would change what the model "
            "computes; set config.model.mask_steps, the updates in which they rise, such as 100."
        )
    for growth in growths(config.train):
        try:
            check_together(settings_at(config, growth.step + 1))
        except ConfigError as error:
            raise ConfigError(
                f"config.train.grow={grow!r} does not fit at step {growth.step}: {error}"
            ) from error


def _check_checkpoints(config: Any) -> None:
    checkpoint = config.checkpoint
    every, keep_every = checkpoint.every_steps, checkpoint.keep_every_steps
    if not every and not checkpoint.every_minutes:
        raise ConfigError(
            "config.checkpoint.every_steps=0 and config.checkpoint.every_minutes=0.0 would save "
            "nothing before the end; set one of them."
        )
    if keep_every and (not every or keep_every % every):
        raise ConfigError(
            f"config.checkpoint.keep_every_steps={keep_every} must be a multiple of "
            f"config.checkpoint.every_steps={every}, or nothing is there to keep."
        )
    if checkpoint.keep_best and not config.evaluation.every_steps:
        raise ConfigError(
            f"config.checkpoint.keep_best={checkpoint.keep_best} needs held-out losses to compare; "
            "set config.evaluation.every_steps."
        )


def _check_idle(group: Any, prefix: str, layers: Any = ()) -> None:
    """Raises ConfigError for a setting of a kind that neither the group nor a layer chooses.

    Args:
      group: of settings.
      prefix: what stands before their names.
      layers: the same group of every layer that has settings of its own.
    """
    for choice, name, settings in idle_kinds(group):
        if any(name in names_in(getattr(layer, choice)) for layer in layers):
            continue
        for path, field, value in walk(settings, f"{prefix}{name}."):
            if value != field.default:
                chosen = getattr(group, choice)
                raise ConfigError(
                    f"{path}={shown(field, value)} has no effect while {prefix}{choice}={chosen!r}"
                    f" does not name {name}; leave it at {shown(field, field.default)}."
                )
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(field.type):
            inner = [getattr(layer, field.name) for layer in layers]
            if prefix == "config." and field.name == "model":
                inner = [layer.model for layer in group.model.by_layer]
            _check_idle(getattr(group, field.name), f"{prefix}{field.name}.", inner)


def _check_effects(group: Any, prefix: str) -> None:
    """Raises ConfigError for a setting that others of its group leave without effect."""
    declared = {field.name: field for field in dataclasses.fields(group)}
    for name, other in idle_settings(type(group), vars(group)).items():
        field, value = declared[name], getattr(group, name)
        if value != field.default:
            wanted = " or ".join(map(str, field.metadata["only_with"].get(other, ())))
            raise ConfigError(
                f"{prefix}{name}={shown(field, value)} has no effect while "
                f"{prefix}{other}={shown(declared[other], getattr(group, other))}; leave it at "
                f"{shown(field, field.default)}, or set {prefix}{other}"
                f"{f' to {wanted}' if wanted else ''}."
            )
    for name, field in declared.items():
        if dataclasses.is_dataclass(field.type):
            _check_effects(getattr(group, name), f"{prefix}{name}.")


def _check_losses(config: Any) -> None:
    """Raises ConfigError for a loss that a router cannot serve, that needs another batch, or whose
    settings have no effect."""
    model, losses = config.model, all_kinds(config.loss)
    weights = coefficients(losses, [moe.route for moe in model.moe_settings])
    if model.num_moe_layers:
        _check_unused_losses(losses, weights)
    moved = [name for name in weights if moves(losses[name], weights[name])]
    for moe, name in itertools.product(dict.fromkeys(model.moe_settings), moved):
        _check_served(moe, name, losses[name], model.width)
    for moe, name in itertools.product(dict.fromkeys(model.moe_settings), weights):
        if obstacle := losses[name].obstacle(moe.num_experts, model.width):
            raise ConfigError(f"config.loss.{name}.{obstacle}.")
    whole = [name for name in moved if not losses[name].additive]
    alone = [name for name in moved if losses[name].by_microbatch]
    if whole and alone:
        raise ConfigError(
            f"config.loss.{alone[0]}.over='microbatch' cannot be kept beside config.loss.{whole[0]}"
            ", which needs the whole batch; set it to 'batch'."
        )


def _check_unused_losses(losses: Any, weights: Any) -> None:
    """Raises ConfigError for a setting of a loss that is not computed, unless it says so."""
    for name in losses.keys() - weights.keys():
        for path, field, value in walk(losses[name], f"config.loss.{name}."):
            if value != field.default and not (field.name == "weight" and not value):
                raise ConfigError(
                    f"{path}={shown(field, value)} has no effect while no layer has the loss; "
                    f"leave it at {shown(field, field.default)}, or set config.loss.{name}.weight."
                )


def _check_served(moe: Any, name: str, loss: Any, width: int) -> None:
    gives = moe.route.gives | moe.route.parameters(width, moe.num_experts).keys()
    # The kinds of experts, whose parameters all have an axis E, are registered by a room above.
    known = moe.experts in EXPERTS
    if known:
        gives |= moe.expert_kind.parameters(width, moe.num_experts, moe.hidden_width).keys()
    gives |= {OUTPUTS}
    lacks = sorted(need for need in loss.needs - gives if known or "_E" not in need)
    if lacks and (loss.weight != AUTO or name in moe.route.losses):
        raise ConfigError(
            f"config.loss.{name}.weight={_shown_weight(loss)} needs {' and '.join(lacks)}, which "
            f"config.model.moe.router={moe.router!r} does not give; set it to 0."
        )


def _shown_weight(loss: Any) -> Any:
    """The weight of a loss as people read it."""
    return "auto" if loss.weight == AUTO else loss.weight
