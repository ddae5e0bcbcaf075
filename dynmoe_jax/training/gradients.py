"""Gradients of a batch, in one piece or by gradient accumulation over microbatches.

Axis legend: B batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.training.loss import BatchSums, TrainingLoss
from dynmoe_jax.training.objectives import Batch
from dynmoe_jax.training.objectives.objective import valid
from dynmoe_jax.training.trainable import split_trainable

Aux = tuple[dict[str, Float[Array, ""]], BatchSums]
"""(parts of the loss by name, sums of the batch)."""


def make_gradients(
    cfg: config.Config, structure: nnx.GraphDef, loss: TrainingLoss
) -> Callable[..., tuple[nnx.State, Aux]]:
    """Builds (params, batch, coefficients, key) -> gradients of the loss of the whole batch.

    Over ``train.microbatches`` parts a loss that is a mean over all tokens has gradients that add
    up.  The load-balance loss multiplies two means, and how much a part weighs an expert depends on
    all parts; a loss says so by ``additive``.  If one does:

    - one pass forward through all parts comes first, in which only sums are kept; then each part is
      computed again, forward and backward.  The gradient is that of the batch in one piece.
    - With ``loss.balance.over="microbatch"`` balance is asked for within each part instead,
      weighted by its valid tokens.

    Args:
      cfg: all settings.
      structure: of the decoder.
      loss: of the run.
    """
    parts = cfg.train.microbatches

    def gradients(params, batch, coefficients, key=None):
        trained, rest = split_trainable(params, cfg)

        def sums(trained, part) -> BatchSums:
            decoder = nnx.merge(structure, nnx.merge_state(trained, rest))
            return loss.sums(decoder, part, key)

        def of_batch(sums_of_batch, shares=(1.0, 1.0)):
            def objective(trained):
                recorded = sums_of_batch(trained)
                total, losses = loss.value(recorded, coefficients, shares)
                return total, (losses, recorded)

            return jax.grad(objective, has_aux=True)(trained)

        if parts == 1:
            return of_batch(lambda trained: sums(trained, batch))
        split = _split(batch | {"row": jnp.arange(batch["tokens"].shape[0])}, parts)
        if not loss.additive:
            # Nothing is kept of a part: backward computes it again.
            part_sums = jax.checkpoint(
                sums, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
            )
            return of_batch(lambda trained: _add_up(lambda part: part_sums(trained, part), split))

        def weights(part):
            """Divisors of the means of a part: the objective's and the routing losses'."""
            weights_BL = loss.objective.loss_weights(part), valid(part)
            return [jnp.sum(weight_BL, dtype=float) for weight_BL in weights_BL]

        whole = weights(batch)

        def of_part(part):
            shares = jax.tree.map(lambda a, b: a / jnp.where(b > 0, b, 1), weights(part), whole)
            return of_batch(lambda trained: sums(trained, part), shares)

        return _add_up(of_part, split)

    return gradients


def _split(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...].

    Part m takes rows m, m + parts, …: each device keeps the rows that it holds.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def _add_up(compute: Callable[[Batch], Any], split: Batch) -> Any:
    """The sum of what ``compute`` returns for every part."""
    shapes = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, compute(part)), None

    return jax.lax.scan(add, zeros, split)[0]
