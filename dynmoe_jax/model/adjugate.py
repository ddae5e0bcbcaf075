"""Adjugate experts: a narrow expert of each group of experts (Grove MoE, arXiv 2508.07785).

A token that uses experts of a group also uses the group's adjugate expert, once, weighed by the sum
of their weights: between k / g and k more narrow rows for k experts in groups of g.

Axis legend: T tokens, E experts, K slots per token, J slots of groups, G groups, D model width.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.experts import apply_experts, make_backend, make_transport
from dynmoe_jax.experts.parallel.shard import RowBound
from dynmoe_jax.mesh.axes import EXPERT, mesh_sizes
from dynmoe_jax.mesh.sharding import by_token
from dynmoe_jax.model.components import compute_dtype, drawn
from dynmoe_jax.routing import Routing


class AdjugateExperts(nnx.Module):
    """The adjugate experts of a layer, of the same kind as its experts."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        moe = model.moe
        self.kind, self.dtype = moe.expert_kind, compute_dtype(model)
        self.group, self.scale = moe.adjugate_group, moe.adjugate_scale
        # As a layer of fewer and narrower experts.
        self.moe = dataclasses.replace(
            moe, num_experts=adjugates_of(moe), hidden_width=moe.adjugate_width
        )
        declared = self.kind.parameters(model.width, self.moe.num_experts, moe.adjugate_width)
        self.names = tuple(declared)
        for name, parameter in declared.items():
            setattr(self, name, drawn(rngs, parameter, model.init_std))
        self.backend = make_backend(self.moe, plain=model.plain)

    def __call__(
        self, x_TD: Float[Array, "T D"], routing: Routing, row_bound: RowBound
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        """Returns (the scaled sum of each token's adjugate experts, rows dropped).

        Args:
          x_TD: tokens.
          routing: of the layer's experts.
          row_bound: most rows of their tokens, which those of adjugate experts keep to as well.
        """
        # Per device: the partitioner does not split a sort on CPU.
        touched = by_token(lambda routing, _: routing_of_groups(routing, self.group), routing)
        weight_TJ = self.scale * touched.weight_TK
        weights = {name: getattr(self, name)[...].astype(self.dtype) for name in self.names}
        return apply_experts(
            x_TD,
            dataclasses.replace(touched, weight_TK=weight_TJ),
            self.kind.dense(weights) if self.kind.stored_dense else weights,
            self.backend,
            row_bound,
            make_transport(self.moe, mesh_sizes()[EXPERT]),
            self.kind.splits_hidden,
        )


def adjugates_of(moe: config.MoE) -> int:
    """G, the adjugate experts of a layer; 0 where there are none."""
    return moe.num_experts // moe.adjugate_group if moe.adjugate_width else 0


def expected_adjugates(moe: config.MoE, experts_per_token: float) -> float:
    """Adjugate experts that a token uses on average, if it uses so many experts, any alike.

    A group of g is left alone with probability prod_{i < g} (E - m - i) / (E - i).
    """
    alone = 1.0
    for i in range(moe.adjugate_group):
        alone *= max(moe.num_experts - experts_per_token - i, 0.0) / (moe.num_experts - i)
    return adjugates_of(moe) * (1 - alone)


def routing_of_groups(routing: Routing, group: int) -> Routing:
    """The groups that each token touches, in the order of choice, with the sums of their weights.

    Expert e belongs to group e // ``group``.  Scores stay those of the experts.
    """
    slots, groups = routing.slots, routing.num_experts // group
    group_TK1 = (routing.expert_TK // group)[..., None]
    chosen_TKG = (group_TK1 == jnp.arange(groups)) & routing.used_TK[..., None]
    weight_TG = jnp.sum(jnp.where(chosen_TKG, routing.weight_TK[..., None], 0.0), axis=-2)
    slot_K1 = jnp.arange(slots, dtype=jnp.int32)[:, None]
    first_TG = jnp.min(jnp.where(chosen_TKG, slot_K1, slots), axis=-2)
    group_TJ = jnp.argsort(first_TG, axis=-1)[..., : min(slots, groups)].astype(jnp.int32)
    used_TJ = jnp.take_along_axis(first_TG, group_TJ, axis=-1) < slots
    return dataclasses.replace(
        routing,
        expert_TK=jnp.where(used_TJ, group_TJ, groups),
        weight_TK=jnp.take_along_axis(weight_TG, group_TJ, axis=-1),
        num_experts=groups,
    )
