"""Initial model of a new run, where it is that of another run, trained here or imported."""

import dataclasses
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.console import console
from dynmoe_jax.data import find_tokenizer, kept_tokenizer, open_tokenizer
from dynmoe_jax.model import Decoder, variable_shapes
from dynmoe_jax.registry import chosen
from dynmoe_jax.runs.begun import saved_config
from dynmoe_jax.runs.checkpoint import FOLDER
from dynmoe_jax.runs.load import OpenedRun, opened_run
from dynmoe_jax.runs.saving.moments import GROUP, Moments
from dynmoe_jax.training.optimizer import moments_of, with_moments
from dynmoe_jax.training.step import TrainState, first_state


def with_initial_model(cfg: config.Config, workdir: Path) -> config.Config:
    """The settings of a run, with those that come from the folder ``config.train.init_from``.

    What the model is comes from there, and so does the tokenizer; how the model is computed
    (``config.model.dtype``, its backend and the like) is the run's own.  So are matrices of
    another kind, such as LoRA, that begin as those of a dense model.  A run that has begun keeps
    what it began with: the folder need not be there any more.

    Args:
      cfg: all settings, as they were asked for.
      workdir: the run's folder.

    Raises:
      ConfigError: the folder holds no run or no tokenizer, ``config.data.tokenizer`` names another
        one than the model's, or settings contradict the model.
      CheckpointError: none of its checkpoints can be read.
      DataError: a tokenizer cannot be read.
    """
    if not cfg.train.init_from:
        return cfg
    begun = saved_config(workdir)
    if begun is not None:
        return _with_model(cfg, begun.model)
    folder = _folder(cfg)
    with opened_run(folder) as run:
        cfg = _with_model(cfg, run.config.model)
    config.check_begun(cfg)
    data = dataclasses.replace(cfg.data, tokenizer=_tokenizer(cfg, folder))
    return dataclasses.replace(cfg, data=data)


def initial_state(
    cfg: config.Config, optimizer: optax.GradientTransformation, shapes: TrainState
) -> TrainState:
    """The state before the first step, with the parameters of another run.

    Moments come along from a model that was made with some, of trainable parameters of the same
    name and shape; others begin at zero, and so do all after a training.

    Args:
      cfg: all settings.
      optimizer: of the trainable parameters.
      shapes: of the state, and how it lies on the devices.

    Raises:
      ConfigError, CheckpointError: they cannot be read.
    """
    folder = _folder(cfg)
    with opened_run(folder) as run:
        carried = _carried(run, shapes)
        told = _told(carried, shapes)
        console.print(f"The model is that of {folder}, step {run.step:,}{told}.", soft_wrap=True)
        known, added = _known(shapes.params, run.config.model)
        params = run.checkpoints.params(run.step, known)
        moments = carried and _read(run, carried)
    if added:
        params = nnx.merge_state(params, _drawn(cfg, added))
    placed = jax.tree.map(lambda x: x.sharding, shapes)
    begin = jax.jit(partial(_begin, cfg, optimizer), out_shardings=placed, donate_argnums=(0, 1))
    return begin(params, moments)


def _begin(
    cfg: config.Config,
    optimizer: optax.GradientTransformation,
    params: nnx.State,
    moments: Moments | None,
) -> TrainState:
    state = first_state(cfg, optimizer, params)
    if moments is None:
        return state
    return dataclasses.replace(state, optimizer=with_moments(state.optimizer, moments))


def _carried(run: OpenedRun, shapes: TrainState) -> Moments | None:
    """Shapes of the moments that come along, and their count; None if none do."""
    if not (run.imported and run.has_moments):
        return None

    def alike(path, leaf):
        return all(run.shape(path, group) == leaf.shape for group in ("first", "second"))

    asked = moments_of(shapes.optimizer)
    first, second = (nnx.split_state(x, alike, ...)[0] for x in (asked.first, asked.second))
    return Moments(first, second, run.updates) if first else None


def _told(carried: Moments | None, shapes: TrainState) -> str:
    """Words on moments that come along."""
    if carried is None:
        return ""
    number, of = (len(x.flat_state()) for x in (carried.first, moments_of(shapes.optimizer).first))
    which = "all" if number == of else f"{number} of {of}"
    return f", with the moments of {which} trainable parameters after {carried.count:,} updates"


def _read(run: OpenedRun, carried: Moments) -> Moments:
    like = {GROUP: {"first": carried.first, "second": carried.second}}
    return Moments(**run.checkpoints.part(run.step, like)[GROUP], count=jnp.int32(carried.count))


def _known(shapes: nnx.State, model: config.Model) -> tuple[nnx.State, nnx.State]:
    """(shapes of variables that a model has, of those that it has not)."""
    names = {path for path, _ in variable_shapes(model).flat_state()}
    return nnx.split_state(shapes, lambda path, _: path in names, ...)


def _drawn(cfg: config.Config, added: nnx.State) -> nnx.State:
    """Variables that a new model would begin with, of all those that are asked for."""
    names = {path for path, _ in added.flat_state()}

    def draw(key):
        drawn = nnx.state(Decoder(cfg.model, rngs=nnx.Rngs(params=key)))
        return nnx.split_state(drawn, lambda path, _: path in names, ...)[0]

    placed = jax.tree.map(lambda x: x.sharding, added)
    return jax.jit(draw, out_shardings=placed)(jax.random.key(cfg.seed))


def _folder(cfg: config.Config) -> Path:
    folder = Path(os.path.expanduser(cfg.train.init_from))
    # Unlike Path's, it says no to a name that is too long.
    if not os.path.isdir(folder / FOLDER):
        raise config.ConfigError(
            f"config.train.init_from={str(folder)!r} holds no run; name the --workdir of one, or "
            "make one of a foreign model: python -m dynmoe_jax.interop import."
        )
    return folder


def _with_model(cfg: config.Config, model: config.Model) -> config.Config:
    """``cfg`` with what decides what a model is; lengths of both are allowed."""
    if cfg.model.layers not in ("", model.layers):
        raise config.ConfigError(
            f"config.model.layers={cfg.model.layers!r} cannot differ from {model.layers!r} of the "
            "model in config.train.init_from; leave it empty."
        )
    settings = config.to_dict(cfg)
    own: tuple[str, ...] = ()
    if model.linear == "dense" and chosen(cfg.model, "linear").begins_dense:
        own = ("model.linear", f"model.{cfg.model.linear}.")
    if not model.mask_steps:  # masks begin at 1
        own += ("model.mask_steps",)
    for path, field, value in config.walk(model, "model."):
        if field.metadata["defines_model"] and not path.startswith(own):
            _, *groups, name = path.split(".")
            inner = settings["model"]
            for group in groups:
                inner = inner[group]
            inner[name] = value
    settings["model"]["max_seq_len"] = max(model.max_seq_len, cfg.model.max_seq_len)
    return config.from_stored(settings)


def _tokenizer(cfg: config.Config, folder: Path) -> str:
    """The path of the tokenizer that the model was trained with."""
    asked, found = cfg.data.tokenizer, find_tokenizer(folder)
    if found is None and not asked:
        raise config.ConfigError(
            f"config.train.init_from={str(folder)!r} holds no tokenizer; name the model's own one "
            "with config.data.tokenizer."
        )
    if found is None:
        return asked
    if asked and open_tokenizer(asked).fingerprint != kept_tokenizer(folder).fingerprint:
        raise config.ConfigError(
            f"config.data.tokenizer={asked!r} is not the tokenizer of the model in "
            f"config.train.init_from={str(folder)!r}; leave config.data.tokenizer empty."
        )
    return str(found)
