"""One step of training: loss, gradients, update.

Axis legend: B batch, L positions, T = B L tokens, N MoE layers, E experts.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dynmoe_jax import config
from dynmoe_jax.model import Decoder, LayerRouting
from dynmoe_jax.model.cross_entropy import cross_entropy_sums
from dynmoe_jax.routing import losses
from dynmoe_jax.training.guard import Guard, new_guard, watch

Batch = dict[str, Int[Array, "B L"]]
"""``tokens``, ``targets``, ``segment_ids`` (0 = padding) and ``positions``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: nnx.State
    optimizer: optax.OptState
    guard: Guard = dataclasses.field(default_factory=new_guard)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingSums:
    """Counts over tokens that can be added up over microbatches and devices.

    Attributes:
      load_NE: tokens that chose each expert.
      dropped_N: rows that found no place.
    """

    load_NE: Int[Array, "N E"]
    dropped_N: Int[Array, "N"]


def routing_sums(routing: LayerRouting | None) -> RoutingSums:
    """The counts of one batch; N = 0 in a dense model."""
    if routing is None:
        return RoutingSums(jnp.zeros((0, 1), jnp.int32), jnp.zeros(0, jnp.int32))
    return RoutingSums(routing.by_layer.load_E, routing.rows_dropped_N)


def init_state(
    model: config.Model, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step; the same key gives the same parameters on any mesh."""
    params = nnx.state(Decoder(model, rngs=nnx.Rngs(params=key)), nnx.Param)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def decoder_structure(model: config.Model) -> nnx.GraphDef:
    """What :func:`nnx.merge` needs to make a decoder of parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))


def loss_parts(
    decoder: Decoder, batch: Batch, valid_total: Float[Array, ""], loss: config.Loss
) -> tuple[Float[Array, ""], tuple[dict[str, Float[Array, ""]], RoutingSums]]:
    """This batch's share of the loss of a whole batch with ``valid_total`` valid tokens.

    L = lm + balance_weight * balance + entropy_weight * entropy + router_z_weight * router_z,
    plus the output z-loss.  The routing losses are averaged over layers.

    Over microbatches the shares add up: the language-model loss is exactly the mean over the
    valid tokens of the whole batch.  The routing losses are the mean of those of the microbatches,
    weighted by their valid tokens; for the entropy and z-losses that is again the mean over all
    tokens, while the balance loss asks for balance within each microbatch.

    Returns:
      the total, and (its parts, the routing counts).
    """
    valid_BL = batch["segment_ids"] > 0
    x_BLD, routing = decoder.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    total, nll_BL = cross_entropy_sums(
        x_BLD,
        decoder.output_DV,
        batch["targets"],
        valid_BL,
        z_weight=loss.z_weight,
        chunk_tokens=loss.chunk_tokens,
    )
    share = jnp.sum(valid_BL) / valid_total
    parts = {"lm_loss": jnp.sum(nll_BL) / valid_total}
    parts |= {name: share * value for name, value in _routing_losses(routing, loss).items()}
    total = (
        total / valid_total
        + loss.balance_weight * parts["balance_loss"]
        + loss.entropy_weight * parts["entropy_loss"]
        + loss.router_z_weight * parts["router_z_loss"]
    )
    return total, (parts | {"loss": total}, routing_sums(routing))


def _routing_losses(routing: LayerRouting | None, loss: config.Loss) -> dict[str, Float[Array, ""]]:
    functions = {
        "balance_loss": partial(losses.balance_loss, normalise=loss.balance_counts),
        "entropy_loss": losses.entropy_loss,
        "router_z_loss": losses.router_z_loss,
    }
    if routing is None:
        return dict.fromkeys(functions, jnp.float32(0))
    return {
        name: jnp.mean(function(routing.by_layer, routing.valid_T))
        for name, function in functions.items()
    }


def make_train_step(
    cfg: config.Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds (state, batch) -> (state, metrics), to be jitted with the state donated.

    Gradients of ``train.microbatches`` equal parts of the batch are added up in float32.  Metrics
    stay on the device: scalars by name, and ``load_NE``.

    Where the loss or a gradient is not finite, parameters and optimizer stay bit for bit what they
    were, and the optimizer counts no step; the training step and the data go on.
    """
    structure = decoder_structure(cfg.model)

    def microbatch_gradients(params, batch, valid_total):
        def objective(params):
            return loss_parts(nnx.merge(structure, params), batch, valid_total, cfg.loss)

        gradients, recorded = jax.grad(objective, has_aux=True)(params)
        return gradients, recorded

    def batch_gradients(params, batch):
        valid_total = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)
        parts = cfg.train.microbatches
        if parts == 1:
            return microbatch_gradients(params, batch, valid_total)
        # Microbatch m takes rows m, m + M, …: each device keeps the rows that it holds.
        split = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
        )

        def add(total, part):
            return jax.tree.map(
                jnp.add, total, microbatch_gradients(params, part, valid_total)
            ), None

        shapes = jax.eval_shape(
            microbatch_gradients, params, jax.tree.map(lambda x: x[0], split), valid_total
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, split)[0]

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
