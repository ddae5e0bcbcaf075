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
from dynmoe_jax.data import LEARNED
from dynmoe_jax.model import Decoder, decoder_shapes
from dynmoe_jax.model.inputs import NOISE, noise_key
from dynmoe_jax.model.masks import with_risen_masks
from dynmoe_jax.registry import chosen
from dynmoe_jax.training.gradients import make_gradients
from dynmoe_jax.training.health.guard import Guard, new_guard, watch, with_other_text
from dynmoe_jax.training.loss import TrainingLoss
from dynmoe_jax.training.objectives import Batch, Objective
from dynmoe_jax.training.router_states import shown_states, with_next_states
from dynmoe_jax.training.routing_losses import Controllers, RoutingLosses
from dynmoe_jax.training.trainable import split_trainable, without_frozen_changes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps done.
      params: variables of the decoder: parameters, and states of routers.
      optimizer: of the trainable parameters.
      guard: against losses and gradients that are not finite.
      controllers: of the coefficients of routing losses.
    """

    step: Int[Array, ""]
    params: nnx.State
    optimizer: optax.OptState
    guard: Guard = dataclasses.field(default_factory=new_guard)
    controllers: Controllers = dataclasses.field(default_factory=dict)


def init_state(
    cfg: config.Config, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step; the same key gives the same parameters on any mesh."""
    return first_state(cfg, optimizer, nnx.state(Decoder(cfg.model, rngs=nnx.Rngs(params=key))))


def first_state(
    cfg: config.Config, optimizer: optax.GradientTransformation, params: nnx.State
) -> TrainState:
    """The state before the first step, around variables of a decoder that are there."""
    trained, _ = split_trainable(params, cfg)
    controllers = RoutingLosses.of(cfg, decoder_shapes(cfg.model)).initial()
    return TrainState(jnp.int32(0), params, optimizer.init(trained), controllers=controllers)


class StepGradients:
    """Computes (state, batch) -> (gradients, (parts of the loss, sums of the batch)).

    Args:
      cfg: all settings.
      objective: theirs, prepared for a tokenizer.
    """

    def __init__(self, cfg: config.Config, objective: Objective | None = None):
        decoder = decoder_shapes(cfg.model)
        self.structure = nnx.graphdef(decoder)
        self.loss = TrainingLoss.of(cfg, decoder, objective)
        self._seed, self._compute = cfg.seed, make_gradients(cfg, self.structure, self.loss)
        readers = [*decoder.moe_feed_forwards, *(loss for _, loss in self.loss.routing.losses)]
        self._draws = any(each.reads & NOISE for each in readers)

    def __call__(self, state: TrainState, batch: Batch):
        """Computes the gradients of the trainable parameters at a step."""
        coefficients = self.loss.routing.coefficients(state.controllers, state.step)
        key = noise_key(self._seed, state.step) if self._draws else None
        return self._compute(state.params, batch, coefficients, key)


def make_train_step(
    cfg: config.Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds (state, batch) -> (state, metrics), to be jitted with the state donated.

    Metrics stay on the device: scalars by name, ``load_NE``, ``dropped_N``, and what the routers'
    states were in this step, ``router_NAME_N``.

    Where the loss or a gradient is not finite, parameters, router states, optimizer and controllers
    stay bit for bit what they were, and the optimizer counts no step; the training step and the
    data go on.
    """
    step_gradients = StepGradients(cfg, objective)
    loss, structure = step_gradients.loss, step_gradients.structure
    plain_from = chosen(cfg.data, "corruption").until_step if cfg.data.corruption else 0

    def train_step(state: TrainState, batch: Batch):
        gradients, (parts, sums) = step_gradients(state, batch)
        counts = loss.counts(sums)
        grad_norm = optax.global_norm(gradients)
        guard = (
            with_other_text(state.guard, state.step == plain_from) if plain_from else state.guard
        )
        update, guard = watch(guard, parts["loss"], grad_norm, cfg.train)

        trained, rest = split_trainable(state.params, cfg)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trained)
        params = nnx.merge_state(optax.apply_updates(trained, updates), rest)
        params, revised = with_next_states(structure, params, [s.measured for s in sums.layers])
        params = without_frozen_changes(params, state.params, cfg)
        params = with_risen_masks(params, cfg.model.mask_steps)
        if revised is not None:
            optimizer_state = _without_moments(optimizer, optimizer_state, revised, cfg)
        controllers = loss.routing.update(state.controllers, counts)

        params, optimizer_state, controllers = jax.tree.map(
            partial(jnp.where, update),
            (params, optimizer_state, controllers),
            (state.params, state.optimizer, state.controllers),
        )
        metrics = parts | {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.guard.skipped),
            "skipped_updates": guard.skipped,
            "skipped_in_a_row": guard.skipped_in_a_row,
            "spike_steps": guard.spike_steps,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "load_NE": counts.load_NE,
            "dropped_N": counts.dropped_N,
        }
        if LEARNED in batch:
            metrics["learned_share"] = jnp.sum(batch[LEARNED]) / jnp.maximum(metrics["tokens"], 1)
        coefficients = loss.routing.coefficients(state.controllers, state.step)
        for name in loss.routing.controllers:
            metrics[f"{name}_coefficient"] = jnp.mean(coefficients[name])
        for name, value_N in shown_states(structure, state.params).items():
            metrics[f"router_{name}_N"] = value_N
        return TrainState(state.step + 1, params, optimizer_state, guard, controllers), metrics

    return train_step


def _without_moments(optimizer, optimizer_state, revised: nnx.State, cfg: config.Config):
    """The optimizer's state with zeros for the moments of the numbers that are marked."""
    marks, _ = split_trainable(revised, cfg)
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, mark: moment if mark is False else jnp.where(mark, 0, moment),
        optimizer_state,
        marks,
    )
