"""One step of training: gradients, guard, update.

Axis legend: N MoE layers, E experts.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.training.gradients import make_gradients
from dynmoe_jax.training.health.guard import Guard, new_guard, watch
from dynmoe_jax.training.objective import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: nnx.State
    optimizer: optax.OptState
    guard: Guard = dataclasses.field(default_factory=new_guard)


def init_state(
    model: config.Model, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step; the same key gives the same parameters on any mesh."""
    params = nnx.state(Decoder(model, rngs=nnx.Rngs(params=key)), nnx.Param)
    return first_state(optimizer, params)


def first_state(optimizer: optax.GradientTransformation, params: nnx.State) -> TrainState:
    """The state before the first step, around parameters that are there."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def make_train_step(
    cfg: config.Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds (state, batch) -> (state, metrics), to be jitted with the state donated.

    Metrics stay on the device: scalars by name, and ``load_NE``.

    Where the loss or a gradient is not finite, parameters and optimizer stay bit for bit what they
    were, and the optimizer counts no step; the training step and the data go on.
    """
    batch_gradients = make_gradients(cfg)

    def train_step(state: TrainState, batch: Batch):
        gradients, (parts, counts) = batch_gradients(state.params, batch)
        grad_norm = optax.global_norm(gradients)
        update, guard = watch(state.guard, parts["loss"], grad_norm, cfg.train)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, optimizer_state = jax.tree.map(
            partial(jnp.where, update),
            (params, optimizer_state),
            (state.params, state.optimizer),
        )
        metrics = parts | {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.guard.skipped),
            "skipped_updates": guard.skipped,
            "skipped_in_a_row": guard.skipped_in_a_row,
            "spike_steps": guard.spike_steps,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "load_NE": counts.load_NE,
            "rows_dropped": jnp.sum(counts.dropped_N),
        }
        return TrainState(state.step + 1, params, optimizer_state, guard), metrics

    return train_step
