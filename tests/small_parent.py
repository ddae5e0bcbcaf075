"""Run's folder of a small model, as training leaves one behind, without training; and surgery."""

import contextlib
import dataclasses
import sys
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.command_line import exit_code
from dynmoe_jax.data import prepare
from dynmoe_jax.model import variable_shapes
from dynmoe_jax.model.components import RouterState
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.surgery import program as command
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.perform import perform
from dynmoe_jax.surgery.request import Options, Request
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule, moments_of, with_moments
from dynmoe_jax.training.step import TrainState, init_state

UPDATES = 7


def dense(settings, **model):
    """Settings of a dense model on the text of others; more may be changed."""
    whole = config.to_dict(settings)
    whole["model"] |= {"moe": {"every_n_layers": 0}} | model
    return config.from_config_dict(whole)


def drawn_state(cfg, seed=0):
    """The state after :data:`UPDATES` updates, all of it drawn by numpy: nothing is compiled."""
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    shapes = jax.eval_shape(partial(init_state, cfg, optimizer), jax.random.key(0))
    random = np.random.default_rng(seed)

    def draw(leaf):
        return random.normal(scale=0.3, size=leaf.shape).astype(np.float32)

    def variable(path, leaf):
        scale = path[-1] == "scale" or isinstance(leaf, RouterState)
        return leaf.replace(1 + abs(draw(leaf)) if scale else draw(leaf))

    params = nnx.from_flat_state([(p, variable(p, x)) for p, x in shapes.params.flat_state()])
    asked = moments_of(shapes.optimizer)
    first = jax.tree.map(draw, asked.first)
    second = jax.tree.map(lambda leaf: draw(leaf) ** 2, asked.second)
    moments = asked._replace(first=first, second=second, count=np.int32(UPDATES))
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = dataclasses.replace(blank, step=np.int32(UPDATES), params=params)
    return dataclasses.replace(state, optimizer=with_moments(blank.optimizer, moments))


def write_parent(folder, cfg, tokenizer, state: TrainState | None = None):
    """Writes a folder with a checkpoint, a tokenizer and prepared text; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / tokenizer.name_in_run)
    prepare(cfg.data, folder / "data")
    state = drawn_state(cfg) if state is None else state
    with contextlib.closing(Checkpoints(folder, cfg.checkpoint)) as checkpoints:
        position = {"tokenizer": tokenizer.fingerprint, "row": UPDATES}
        checkpoints.save(int(state.step), state, position, cfg)
    return folder


def operate(name, *parents, to, **settings):
    """Performs an operation; returns its record."""
    with _no_page():
        return perform(request(name, *parents, to=to, **settings))


@contextlib.contextmanager
def _no_page():
    """Leaves out the pictures, which take as long as all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynmoe_jax.surgery.perform.write_page", lambda *_: None)
        yield patch


def request(name, *parents, to, **settings):
    """Request for an operation; settings are its own, and those that all operations share."""
    settings = {"samples": 0} | settings
    shared = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{key: settings[key] for key in settings.keys() & shared})
    own = {key: settings[key] for key in settings.keys() - shared}
    return Request(OPERATIONS[name](**own), parents, to, options)


def arrays_of(folder, group="params"):
    """Arrays of a run's folder by path, parameters or moments."""
    with opened_run(folder) as run:
        paths = [path for path, _ in variable_shapes(run.config.model).flat_state()]
        return {path: run.read(path, group=group) for path in paths if run.shape(path, group)}


def main(*arguments):
    """Exit code of the command of surgery."""
    with _no_page() as patch:
        patch.setattr(sys, "argv", ["surgery", *map(str, arguments)])
        return exit_code(command.main, command.BAD_INPUT)
