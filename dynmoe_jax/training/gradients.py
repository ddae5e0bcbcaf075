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
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.training.objective import (
    Batch,
    BatchSums,
    RoutingSums,
    batch_sums,
    loss_of,
)

Gradients = tuple[nnx.State, tuple[dict[str, Float[Array, ""]], RoutingSums]]
"""(gradients, (parts of the loss by name, counts))."""


def make_gradients(cfg: config.Config) -> Callable[[nnx.State, Batch], Gradients]:
    """Builds (params, batch) -> gradients of the loss of the whole batch.

    Over ``train.microbatches`` parts the language-model, entropy and z-losses are means over all
    tokens, so gradients of the parts add up.  The load-balance loss multiplies two means, and how
    much a part weighs an expert depends on all parts.  ``loss.balance_over`` chooses:

    - ``"batch"``: one pass forward through all parts first, in which only sums are kept; then each
      part is computed again, forward and backward.  The gradient is that of the batch in one
      piece.
    - ``"microbatch"``: balance is asked for within each part, weighted by its valid tokens.
    """
    structure, parts = decoder_structure(cfg.model), cfg.train.microbatches

    def sums(params: nnx.State, batch: Batch) -> BatchSums:
        return batch_sums(nnx.merge(structure, params), batch, cfg.loss)

    def whole(params, batch):
        def objective(params):
            recorded = sums(params, batch)
            total, losses = loss_of(recorded, cfg.loss)
            return total, (losses, recorded.counts)

        return jax.grad(objective, has_aux=True)(params)

    def balanced_over_batch(params, batch):
        def objective(params):
            # Nothing is kept of a part: backward computes it again.
            part_sums = jax.checkpoint(
                sums, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
            )
            recorded = _add_up(lambda part: part_sums(params, part), _split(batch, parts))
            total, losses = loss_of(recorded, cfg.loss)
            return total, (losses, recorded.counts)

        return jax.grad(objective, has_aux=True)(params)

    def balanced_over_microbatch(params, batch):
        tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)

        def share_of(part):
            def objective(params):
                recorded = sums(params, part)
                total, losses = loss_of(recorded, cfg.loss)
                share = recorded.tokens / tokens
                losses = jax.tree.map(lambda x: share * x, losses)
                return share * total, (losses, recorded.counts)

            return jax.grad(objective, has_aux=True)(params)

        return _add_up(share_of, _split(batch, parts))

    if parts == 1:
        return whole
    needs_batch = cfg.loss.balance_over == "batch" and cfg.loss.balance_weight
    return balanced_over_batch if needs_batch else balanced_over_microbatch


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
