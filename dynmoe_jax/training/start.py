"""Compiled training step of a run, and the state that it begins with."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.mesh.make_mesh import batch_sharding, replicated, state_shardings
from dynmoe_jax.registry import chosen
from dynmoe_jax.runs.compilation import compiler_options
from dynmoe_jax.training.growth import grown
from dynmoe_jax.training.health.rescue import without_old_streak
from dynmoe_jax.training.initial_model import initial_state
from dynmoe_jax.training.objectives import Batch, Objective, batch_arrays
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
    objective = chosen(run.cfg.train, "objective").prepared(tokenizer)
    rewound = config.growth_steps(run.asked.train)
    train_step, shapes = compile_step(run.cfg, run.mesh, objective, rewound)
    run.memory.check_step(train_step)
    return train_step, _first_state(run, done, shapes)


def compile_step(
    cfg: config.Config,
    mesh: Mesh,
    objective: Objective | None = None,
    rewound: tuple[int, ...] = (),
) -> tuple[Callable, TrainState]:
    """Compiles the training step of a run, within its mesh.

    Args:
      cfg: all settings.
      mesh: the devices.
      objective: theirs, prepared for a tokenizer; None: the language model's.
      rewound: steps after which the learning rate begins again.

    Returns:
      the compiled step; shapes of its state, with their shardings.
    """
    schedule = make_schedule(cfg.optimizer, cfg.train.steps, rewound)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    shapes = _placed_shapes(mesh, partial(init_state, cfg, optimizer))
    jitted = jax.jit(
        make_train_step(cfg, optimizer, schedule, objective),
        donate_argnums=0,
        # What the host reads must be whole in every process.
        out_shardings=(_shardings(shapes), replicated(mesh)),
        compiler_options=compiler_options(current_target()),
    )
    return jitted.lower(shapes, _batch_shapes(cfg, batch_sharding(mesh))).compile(), shapes


def new_state(cfg: config.Config, shapes: TrainState) -> TrainState:
    """The state before the first step, its parameters drawn; ``shapes`` of :func:`compile_step`."""
    init = partial(init_state, cfg, _optimizer(cfg))
    # The key is an argument: XLA would spend seconds on folding draws of a constant key.
    return jax.jit(init, out_shardings=_shardings(shapes))(jax.random.key(cfg.seed))


def _placed_shapes(mesh: Mesh, init: Callable) -> TrainState:
    """Shapes of the state, with their shardings."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def _first_state(run: Run, done: int, shapes: TrainState) -> TrainState:
    if done:
        return without_old_streak(_restored(run, done, shapes), run.cfg.train)
    if run.cfg.train.init_from:
        return initial_state(run.cfg, _optimizer(run.cfg), shapes)
    return new_state(run.cfg, shapes)


def _restored(run: Run, done: int, shapes: TrainState) -> TrainState:
    """The state of a checkpoint, grown where the next step has a larger model."""
    before = config.settings_at(run.asked, done)
    if before.model == run.cfg.model:
        return run.checkpoints.restore(done, shapes)[0]
    small = _placed_shapes(run.mesh, partial(init_state, before, _optimizer(before)))
    state, _ = run.checkpoints.restore(done, small)
    return grown(before, run.cfg, done, state, shapes)


def _optimizer(cfg: config.Config) -> optax.GradientTransformation:
    return make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))


def _shardings(shapes: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, shapes)


def _batch_shapes(cfg: config.Config, sharding: jax.sharding.Sharding) -> Batch:
    shape = (cfg.train.batch_size, cfg.data.seq_len)
    array_BL = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return dict.fromkeys(batch_arrays(cfg), array_BL)
