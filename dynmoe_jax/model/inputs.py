"""Inputs of a layer beside the residual stream.

Axis legend: B batch, L positions, R lanes of the rotary table, S scores of a router: those of its
experts, and of the free ones behind them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from dynmoe_jax.routing import Router
from dynmoe_jax.routing.losses import RoutingLoss
from dynmoe_jax.routing.record import alive

NOISE = frozenset({"noise", "step"})
"""Inputs of routers that follow from the key of a step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingInput:
    """Inputs that layers have in training alone.

    Attributes:
      losses: (name, routing loss) of those whose sums leave the layers.
      key: of the step, from :func:`noise_key`; None: no layer draws anything.
      row_B: rows of the sequences in the whole batch, whatever part of it this is.
      activation_sums: (what the nonlinear function of a dense feed-forward is computed of, [B, L,
        F], whether positions are valid, [B, L]) -> sums of each sequence by name, [B], which leave
        such layers; None: nothing does.
      layer: number of the layer in the decoder.
    """

    losses: tuple[tuple[str, RoutingLoss], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    key: "NoiseKey | None" = None
    row_B: Int[Array, "B"] | None = None
    layer: Int[Array, ""] | int = 0
    activation_sums: Callable[[Array, Array], Mapping[str, Array]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def at(self, layer: Int[Array, ""] | int) -> "TrainingInput":
        """The inputs of another layer."""
        return dataclasses.replace(self, layer=layer)

    def layer_key(self) -> UInt32[Array, "2"]:
        """A key of seed, step and layer alone."""
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key.of_step), self.layer)
        # Rows of the batch, whose keys follow from this one, are fewer.
        return jax.random.key_data(jax.random.fold_in(key, 2**31 - 1))

    def key_T(self, length: int) -> UInt32[Array, "T 2"]:
        """A key of each token: of seed, step, layer, row of the batch and position.

        The same on every mesh, and however the batch is cut into microbatches.
        """
        base = jax.random.fold_in(jax.random.wrap_key_data(self.key.of_step), self.layer)

        def of_token(row, position):
            return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(base, row), position))

        rows, positions = self.row_B, jnp.arange(length)
        keys_BL2 = jax.vmap(jax.vmap(of_token, (None, 0)), (0, None))(rows, positions)
        return keys_BL2.reshape(-1, 2)

    def run_key(self) -> UInt32[Array, "2"]:
        """A key of seed and layer, the same in every step."""
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key.of_run), self.layer)
        return jax.random.key_data(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseKey:
    """The keys from which all noise of a training step follows.

    Attributes:
      of_step: of seed and step.
      of_run: of the seed alone, for draws that several steps share.
      step: number of the step.
    """

    of_step: UInt32[Array, "2"]
    of_run: UInt32[Array, "2"]
    step: Int[Array, ""]


def noise_key(seed: int, step: Int[Array, ""]) -> NoiseKey:
    """The keys of a step; nothing of them is stored."""
    # A purpose of its own: parameters and samples draw from the seed as well.
    key = jax.random.fold_in(jax.random.key(seed), 0x6E6F6973)
    # Of its own again: a step must not have the number that draws of the run fold in.
    run = jax.random.fold_in(jax.random.key(seed), 0x72756E73)
    of_step = jax.random.fold_in(key, step)
    return NoiseKey(jax.random.key_data(of_step), jax.random.key_data(run), step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenPositions:
    """The tokens of a batch, as every layer may read them.

    Attributes:
      segment_ids_BL: which document a position belongs to; 0 is padding.
      rotary_BLR: :func:`~dynmoe_jax.model.rotary.rotary_table` of the positions within the
        documents, for heads of ``config.model.head_width``.
      token_ids_BL: ids, for routers that read them.
      training: None when evaluating or generating.
      router_cache: of the layer's router, for the sequences' earlier tokens, see
        :meth:`~dynmoe_jax.routing.router.Router.initial_cache`; empty unless it is carried.
      other_rotary: tables for the heads of layers that differ, by their width.
      previous_BLS: router logits of the MoE layer before, float32, with room for those of any
        layer: experts from the front on, free ones up to the end, zeros between, and in front of
        the first layer.  None unless a router reads them.
    """

    segment_ids_BL: Int[Array, "B L"]
    rotary_BLR: Float[Array, "B L R"]
    token_ids_BL: Int[Array, "B L"] | None = None
    training: TrainingInput | None = None
    router_cache: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    other_rotary: Mapping[int, Float[Array, "B L R"]] = dataclasses.field(default_factory=dict)
    previous_BLS: Float[Array, "B L S"] | None = None

    def of_heads(self, width: int) -> "TokenPositions":
        """The inputs of attention with heads of that width; every array is [B, L, ...]."""
        rotary_BLR = self.other_rotary.get(width, self.rotary_BLR)
        # What is left out is for feed-forwards.
        return TokenPositions(self.segment_ids_BL, rotary_BLR, self.token_ids_BL)

    def at_layer(self, layer: Int[Array, ""] | int) -> "TokenPositions":
        """The inputs of a layer by its number."""
        if self.training is None:
            return self
        return dataclasses.replace(self, training=self.training.at(layer))

    def behind(self, logits_TS: Float[Array, "T S"], experts: int) -> "TokenPositions":
        """The inputs of the layers behind an MoE layer with these logits, of so many experts."""
        if self.previous_BLS is None:
            return self
        # A dead expert's says nothing of the token.
        logits_TS = jnp.where(alive(logits_TS), logits_TS, 0.0)
        free = logits_TS.shape[-1] - experts
        return self.with_previous(
            _by_kind(logits_TS, experts, free, self.previous_BLS.shape[-1]).reshape(
                self.previous_BLS.shape
            )
        )

    def with_previous(self, previous_BLS: Float[Array, "B L S"] | None) -> "TokenPositions":
        """The same tokens behind other logits."""
        return dataclasses.replace(self, previous_BLS=previous_BLS)

    def previous_TS(self, experts: int, free: int) -> Float[Array, "T S"]:
        """The logits of the MoE layer before, for a router of so many experts and free ones.

        Where that layer had another number of either, its last experts, or its first free ones, are
        left out, or zeros stand in their places.
        """
        width = self.previous_BLS.shape[-1]
        previous_TS = self.previous_BLS.reshape(-1, width)
        return _by_kind(previous_TS, experts, free, experts + free)


def _by_kind(
    scores_TS: Float[Array, "T S"], experts: int, free: int, width: int
) -> Float[Array, "T W"]:
    """The columns of experts, in front, and of free ones, at the end, with zeros between them."""
    if scores_TS.shape[-1] == width:
        return scores_TS
    expert_TE, free_TX = scores_TS[:, :experts], scores_TS[:, scores_TS.shape[-1] - free :]
    between_T_ = jnp.zeros((len(scores_TS), width - experts - free), scores_TS.dtype)
    return jnp.concatenate([expert_TE, between_T_, free_TX], axis=-1)


def room_for_previous(routers: Sequence[tuple[Router, int]]) -> int:
    """The most experts and the most free ones of a layer together, which logits of the layer
    before need room for; 0 where no router reads them.

    Args:
      routers: (router, number of experts) of every MoE layer.
    """
    if not any("previous_logits" in router.reads for router, _ in routers):
        return 0
    most_free = max(router.free_experts for router, _ in routers)
    return max(experts for _, experts in routers) + most_free
