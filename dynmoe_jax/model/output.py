"""The results of a decoder: logits, and the routing of its MoE layers.

Axis legend: B batch, L positions, T = B L tokens, V vocabulary, N MoE layers, E experts, K slots
per token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.model.inputs import TrainingInput
from dynmoe_jax.routing import Router, RouterInput, Routing, SoftSlots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSums:
    """Sums over the tokens of one MoE layer, which leave it in training.

    A leading axis M is of devices until it is added up, all layers at a time: one message instead
    of one for each layer.

    Attributes:
      load_E: valid tokens that chose each expert.
      losses: sums of each routing loss, by its name.
      measured: what the router measured, see
        :meth:`dynmoe_jax.routing.router.Router.measure`.
    """

    load_E: Int[Array, "*M E"]
    losses: Mapping[str, Mapping[str, Array]]
    measured: Any


def layer_sums(
    router: Router,
    params: Mapping[str, Array],
    given: RouterInput,
    routing: Any,
    training: TrainingInput | None,
) -> LayerSums | None:
    """The sums of the tokens of one device; None when nothing is trained."""
    if training is None:
        return None
    losses = {
        name: loss.sums(routing, given, params)
        for name, loss in training.losses
        if loss.needs <= router.gives | params.keys()
    }
    return LayerSums(routing.load_E, losses, router.measure(params, given, routing))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoERecord:
    """The record of one MoE layer.

    Attributes:
      routing: what its router decided.
      sums: over its tokens, by device; None outside of training.
      dropped: (token, expert) pairs that a transform, a capacity or an exchange left out.
      kept_T: experts of each token that the transforms have left.
      router_cache: with these tokens, where one was given.
    """

    routing: Routing
    sums: LayerSums | None
    dropped: Int[Array, ""]
    kept_T: Int[Array, "T"]
    router_cache: Mapping[str, Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """The routing of N MoE layers, as losses and reports read it.

    Attributes:
      by_layer: a Routing whose arrays are stacked: [N, T, K] and [N, T, E].
      valid_BL: False for padding.
      rows_dropped_N: rows that a transform, a capacity or an exchange left out.
      exists_NE: False where a layer has fewer experts than the largest.
    """

    by_layer: Routing
    valid_BL: Bool[Array, "B L"]
    rows_dropped_N: Int[Array, "N"]
    exists_NE: Bool[Array, "N E"]

    @property
    def valid_T(self) -> Bool[Array, "T"]:
        """valid_BL, flattened like the tokens of ``by_layer``."""
        return self.valid_BL.reshape(-1)

    @property
    def experts_per_token(self) -> Int[Array, "N B L"]:
        """Experts that each token used in each MoE layer."""
        return self.by_layer.experts_per_token_T.reshape(-1, *self.valid_BL.shape)

    @property
    def probs(self) -> Float[Array, "N B L E"]:
        """Router probabilities."""
        probs_NTE = self.by_layer.probs_TE
        return probs_NTE.reshape(-1, *self.valid_BL.shape, probs_NTE.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """The results of a decoder.

    Attributes:
      logits: [B, L, V], float32.
      routing: of the MoE layers; None in a dense model.
    """

    logits: Float[Array, "B L V"]
    routing: LayerRouting | None


def routing_of_layers(
    records: Sequence[MoERecord], layers: Sequence[Sequence[int]], valid_BL: Bool[Array, "B L"]
) -> LayerRouting | None:
    """The routing of all MoE layers in their order, padded to the most experts and slots of one.

    Args:
      records: each of layers that are computed by one program, with a leading axis over them.
      layers: the numbers of those layers.
      valid_BL: False for padding.
    """
    if not records:
        return None
    routings = [record.routing for record in records]
    if len(records) > 1:
        routings = [r.by_token() if isinstance(r, SoftSlots) else r for r in routings]
    if len(records) == 1:
        exists_NE = jnp.ones((len(layers[0]), routings[0].num_experts), bool)
        return LayerRouting(routings[0], valid_BL, records[0].dropped, exists_NE)
    exists_NE = _exists([routing.num_experts for routing in routings], layers)
    experts, scores = exists_NE.shape[1], max(r.probs_TE.shape[-1] for r in routings)
    slots = max(routing.slots for routing in routings)
    padded = [_padded(routing, experts, scores, slots) for routing in routings]
    by_layer = in_layer_order(padded, layers)
    dropped_N = in_layer_order([record.dropped for record in records], layers)
    return LayerRouting(by_layer, valid_BL, dropped_N, jnp.asarray(exists_NE))


def padded(arrays: Sequence[Array]) -> list[Array]:
    """Arrays with zeros behind their last axes, up to the longest."""
    width = max(array.shape[-1] for array in arrays)
    return [
        jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])
        for array in arrays
    ]


def in_layer_order(parts: Sequence[Any], layers: Sequence[Sequence[int]]) -> Any:
    """Trees with leading axes over some layers each, as one over all, in the order of the layers.

    Args:
      parts: alike but for the leading axis.
      layers: the numbers of the layers of each.
    """
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([np.asarray(numbers) for numbers in layers]))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[order], *parts)


def by_program(array_N: Array, layers: Sequence[Sequence[int]]) -> list[Array]:
    """Undoes :func:`in_layer_order`: the layers of each part.

    Args:
      array_N: over all layers, in their order.
      layers: the numbers of the layers of each part.
    """
    order = sorted(number for numbers in layers for number in numbers)
    return [array_N[np.searchsorted(order, np.asarray(numbers))] for numbers in layers]


def _exists(experts: Sequence[int], layers: Sequence[Sequence[int]]) -> Bool[np.ndarray, "N E"]:
    """Whether the layers, in their order, have so many experts."""
    pairs = zip(experts, layers, strict=True)
    by_layer = {number: count for count, numbers in pairs for number in numbers}
    counts = np.array([by_layer[number] for number in sorted(by_layer)])
    return np.arange(max(experts)) < counts[:, None]


def _padded(routing: Routing, experts: int, scores: int, slots: int) -> Routing:
    """A routing with more columns: empty slots, and experts that do not exist.

    What not every layer has (``free_T``, ``extra``) is left out.
    """

    def wider(x_X, width, fill):
        room = width - x_X.shape[-1]
        return jnp.pad(x_X, [(0, 0)] * (x_X.ndim - 1) + [(0, room)], constant_values=fill)

    expert_TK = jnp.where(routing.used_TK, routing.expert_TK, experts)
    return Routing(
        wider(expert_TK, slots, experts),
        wider(routing.weight_TK, slots, 0),
        wider(routing.probs_TE, scores, 0),
        wider(routing.logits_TE, scores, 0),
        experts,
    )
