"""Compiled training step of a run, and the state that it begins with."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS, Tokenizer
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.mesh.make_mesh import batch_sharding, replicated, state_shardings
from dynmoe_jax.registry import chosen
from dynmoe_jax.runs.compilation import compiler_options
from dynmoe_jax.training.health.rescue import without_old_streak
from dynmoe_jax.training.initial_model import initial_state
from dynmoe_jax.training.objectives import Batch
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.run import Run
from dynmoe_jax.training.step import TrainState, init_state, make_train_step


def start(run: Run, done: int, tokenizer: Tokenizer) -> tuple[Callable, TrainState]:
    """Compiles the training step, and makes the state after step ``done``, within the run's mesh.

    Args:
      run: the run.
      done: a step with a checkpoint; 0 for a new state.
      tokenizer: of the run.

    Returns:
      the compiled step; the state.

    Raises:
      OutOfMemory: the compiled step does not fit into the devices.
      ConfigError, CheckpointError: the state cannot be read.
    """
    schedule = make_schedule(run.cfg.optimizer, run.cfg.train.steps)
    optimizer = make_optimizer(run.cfg.optimizer, schedule)
    init = partial(init_state, run.cfg, optimizer)
    shapes = _placed_shapes(run, init)
    objective = chosen(run.cfg.train, "objective").prepared(tokenizer)
    train_step = _compile(run, make_train_step(run.cfg, optimizer, schedule, objective), shapes)
    run.memory.check_step(train_step)
    return train_step, _first_state(run, done, init, optimizer, shapes)


def _placed_shapes(run: Run, init: Callable) -> TrainState:
    """Shapes of the state, with their shardings."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, run.mesh),
    )


def _compile(run: Run, step: Callable, shapes: TrainState) -> Callable:
    jitted = jax.jit(
        step,
        donate_argnums=0,
        # What the host reads must be whole in every process.
        out_shardings=(_shardings(shapes), replicated(run.mesh)),
        compiler_options=compiler_options(current_target()),
    )
    return jitted.lower(shapes, _batch_shapes(run.cfg, batch_sharding(run.mesh))).compile()


def _first_state(
    run: Run,
    done: int,
    init: Callable,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
) -> TrainState:
    if done:
        state, _ = run.checkpoints.restore(done, shapes)
        return without_old_streak(state, run.cfg.train)
    if run.cfg.train.init_from:
        return initial_state(run.cfg, optimizer, shapes)
    # The key is an argument: XLA would spend seconds on folding draws of a constant key.
    return jax.jit(init, out_shardings=_shardings(shapes))(jax.random.key(run.cfg.seed))


def _shardings(shapes: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, shapes)


def _batch_shapes(cfg: config.Config, sharding: jax.sharding.Sharding) -> Batch:
    shape = (cfg.train.batch_size, cfg.data.seq_len)
    array_BL = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return dict.fromkeys(BATCH_ARRAYS, array_BL)
