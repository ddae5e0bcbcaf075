"""Checks between settings: those that need more than one."""

from typing import Any

from dynmoe_jax.fields import ConfigError


def check_together(config: Any) -> None:
    """Raises ConfigError if settings, each allowed by itself, contradict each other.

    Args:
      config: a whole :class:`dynmoe_jax.config.Config`.
    """
    model, train = config.model, config.train
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"config.model.num_kv_heads={model.num_kv_heads} must divide "
            f"config.model.num_heads={model.num_heads}."
        )
    if model.head_width % 2:
        raise ConfigError(f"config.model.head_width={model.head_width} must be even, for RoPE.")
    _check_moe(model)
    if config.data.seq_len > model.max_seq_len:
        raise ConfigError(
            f"config.data.seq_len={config.data.seq_len} must be at most "
            f"config.model.max_seq_len={model.max_seq_len}; raise the latter."
        )
    if train.batch_size % train.microbatches:
        raise ConfigError(
            f"config.train.microbatches={train.microbatches} must divide "
            f"config.train.batch_size={train.batch_size}."
        )
    _check_mesh(config.mesh)
    _check_checkpoints(config)


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
    if moe.router == "top_k" and moe.top_k > moe.num_experts:
        raise ConfigError(
            f"config.model.moe.top_k={moe.top_k} must be at most "
            f"config.model.moe.num_experts={moe.num_experts}."
        )
    if moe.shared_gate and not moe.shared_hidden_width:
        raise ConfigError(
            "config.model.moe.shared_gate=True has no shared expert to weigh; set "
            "config.model.moe.shared_hidden_width."
        )
    if -1 < moe.saved_rows_per_token < 0:
        raise ConfigError(
            f"config.model.moe.saved_rows_per_token={moe.saved_rows_per_token:g} must be 0 or more,"
            " or -1 for as many as the router usually chooses."
        )


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
