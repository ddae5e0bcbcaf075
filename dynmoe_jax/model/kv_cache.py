"""The KV cache: keys and values are kept, so that every position is computed once; and so is what
routers ask for of earlier tokens (:meth:`~dynmoe_jax.routing.router.Router.initial_cache`).

Two passes keep them or use them.  :func:`prefill` computes whole contexts, by the attention that
training uses, and keeps the keys and values of every layer.  :func:`decode_step` computes positions
behind a context, which attend to what was kept and to themselves.  Sequences of different lengths
are filled up at their left, so that the next position stands in the same slot for all of them.

:func:`decode_step` takes the layers in one of two forms.  Stacked, in a scan: its program does not
grow with depth, but XLA copies the parameters of a layer out of the stack in every pass.  Or one by
one, from parameters that :func:`unstacked` has copied once.  Reading parameters is what decoding
costs, so the latter is faster; its program takes longer to compile (docs/measurements.md:
cpu-decode-loop).

Axis legend: B sequences, P positions of a context, C tokens of a row that a step computes, S slots,
D model width, H query heads, G key/value heads, R = H/G query heads of one key/value head, W head
width, N MoE layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.model.decoder import Decoder
from dynmoe_jax.model.layer import Layer
from dynmoe_jax.model.output import in_layer_order
from dynmoe_jax.model.stacks import stacks_of

LayerKV = Any
"""(key_BSGW, value_BSGW) of every layer, nested as the parameters are: over stacks, over groups (a
tuple, or a leading axis of the arrays), over the layers of a group."""

RouterCaches = Any
"""Caches of the layers' routers by name, see
:meth:`~dynmoe_jax.routing.router.Router.initial_cache`, nested alike; mostly empty."""


Attend = Callable[..., tuple[Array, Any]]
"""``(layer, kv of the layer, query, key, value) -> (attended values, new kv of the layer)``."""


class Cache(Protocol):
    """Keys and values of contexts, with room for those of positions behind them.

    Attributes:
      kv: of every layer, see :data:`LayerKV`.
      routers: caches of the routers, see :data:`RouterCaches`; None: they keep none.
      step_shape: [B, C] of the tokens that one step of decoding computes, one for each sequence.
    """

    kv: LayerKV
    routers: RouterCaches | None
    step_shape: tuple[int, int]

    def behind(self, count: int) -> tuple[Int[Array, "B C"], Attend]:
        """(positions in their texts of the next ``count`` tokens of a row, how they attend)."""

    def filled(self, kv: LayerKV, routers: RouterCaches, count: int) -> "Cache":
        """The cache with what ``count`` tokens of a row have added."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences in slots; sequence b has filled ``start_B[b]`` to ``end``.

    Attributes:
      kv: of every layer.
      routers: caches of the layers' routers.
      start_B: the first slot of each sequence.
      end: one behind the last filled slot.
    """

    kv: LayerKV
    routers: RouterCaches
    start_B: Int[Array, "B"]
    end: Int[Array, ""]

    @property
    def step_shape(self) -> tuple[int, int]:
        """[B, 1]: each sequence is a row."""
        return len(self.start_B), 1

    def behind(self, count: int) -> tuple[Int[Array, "B C"], Attend]:
        """(positions of the next ``count`` slots, attention to the filled slots and to these)."""
        slots = jax.tree.leaves(self.kv)[0].shape[-3]
        slot_C = self.end + jnp.arange(count)
        visible_BCS = jnp.arange(slots) <= slot_C[None, :, None]
        visible_BCS &= jnp.arange(slots) >= self.start_B[:, None, None]

        def attend(_, kv, query_BCHW, *new):
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.end, axis=1)
            kv = tuple(write(a, b.astype(a.dtype)) for a, b in zip(kv, new, strict=True))
            return _attend(query_BCHW, *kv, visible_BCS), kv

        return slot_C - self.start_B[:, None], attend

    def filled(self, kv: LayerKV, routers: RouterCaches, count: int) -> "KVCache":
        """The cache with ``count`` more slots."""
        return KVCache(kv, routers, self.start_B, self.end + count)


def prefill(
    decoder: Decoder, tokens_BP: Int[Array, "B P"], start_B: Int[Array, "B"]
) -> tuple[Float[Array, "B P D"], KVCache, Int[Array, "N B P"]]:
    """Computes contexts, and keeps the keys and values of their P positions.

    Args:
      decoder: with stacked parameters.
      tokens_BP: the contexts, filled up at the left.
      start_B: where they begin; P for a row without one.

    Returns:
      the normed residual stream; a cache of P slots, all filled; experts that each position used.
    """
    positions_BP = jnp.arange(tokens_BP.shape[1]) - start_B[:, None]
    segment_ids_BP = (positions_BP >= 0).astype(jnp.int32)
    positions_BP = jnp.maximum(positions_BP, 0)

    def attend(layer, _, query_BPHW, key_BPGW, value_BPGW):
        mixed_BPHW = layer.attention.attend(query_BPHW, key_BPGW, value_BPGW, segment_ids_BP)
        return mixed_BPHW, (key_BPGW, value_BPGW)

    nothing = [[None for _ in stack.layers] for stack in decoder.stacks]
    stacks = stacked(decoder)
    routers = router_caches(decoder, tokens_BP.shape)
    x_BPD, kv, routers, experts = apply_layers(
        decoder, stacks, tokens_BP, segment_ids_BP, positions_BP, nothing, attend, routers
    )
    return x_BPD, KVCache(kv, routers, start_B, jnp.int32(tokens_BP.shape[1])), experts


def decode_step(
    decoder: Decoder,
    stacks: list,
    tokens_BC: Int[Array, "B C"],
    valid_BC: Bool[Array, "B C"],
    cache: Cache,
) -> tuple[Float[Array, "B C D"], Cache, Int[Array, "N B C"]]:
    """Computes the next C tokens of each row of a cache, and keeps their keys and values in it.

    The cache that is passed stays valid for other continuations; where it is not used again (in a
    loop, or donated), XLA writes in place.

    Args:
      decoder: embedding, norms and the structure of the layers.
      stacks: the layers' parameters, from :func:`stacked` or :func:`unstacked`; the cache is
        nested alike (:func:`unstacked_cache`).
      tokens_BC: next tokens of each row: of a :class:`KVCache` C successive ones, filled up at the
        right; of a cache whose ``step_shape`` says so, one of each of C sequences.
      valid_BC: False where filled up, or where nobody asks: such positions use no experts.
      cache: with room for C tokens.

    Returns:
      the normed residual stream; the cache with C more tokens; experts that each position used.
    """
    count = tokens_BC.shape[1]
    positions_BC, attend = cache.behind(count)
    segment_ids_BC = valid_BC.astype(jnp.int32)
    x_BCD, kv, routers, experts = apply_layers(
        decoder, stacks, tokens_BC, segment_ids_BC, positions_BC, cache.kv, attend, cache.routers
    )
    return x_BCD, cache.filled(kv, routers, count), experts


def stacked(decoder: Decoder) -> list[nnx.State]:
    """The layers' parameters as they are in a decoder."""
    return [nnx.split(stack)[1] for stack in decoder.stacks]


def unstacked(decoder: Decoder) -> list[tuple[nnx.State, ...]]:
    """The layers' parameters, those of each group by themselves, in the compute type.

    A second copy of the weights (on CPU; of half their size where the compute type is bfloat16).
    """
    dtype = compute_dtype(decoder.config)
    routers = {
        name
        for layer in decoder.moe_feed_forwards
        for name in (*layer.router_names, *layer.state_names)
    }

    def cast(path, stack_array):
        # Norms and routers compute in float32.
        names = {getattr(key, "key", None) for key in path}
        text = jax.tree_util.keystr(path)
        precise = "scale" in text or "router" in text or bool(names & routers)
        return stack_array if precise else stack_array.astype(dtype)

    return [_parted(jax.tree.map_with_path(cast, params)) for params in stacked(decoder)]


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with free slots behind its own, up to ``slots``."""

    def widen(array, axis):
        room = [(0, 0)] * array.ndim
        room[axis] = (0, slots - array.shape[axis])
        return jnp.pad(array, room)

    def widen_router(path, array):
        axes = axes_of(path[-1].key)
        return widen(array, axes.index("S") - len(axes)) if "S" in axes else array

    return dataclasses.replace(
        cache,
        kv=jax.tree.map(partial(widen, axis=-3), cache.kv),
        routers=jax.tree.map_with_path(widen_router, cache.routers),
    )


def repeated(cache: KVCache, times: int) -> KVCache:
    """Each sequence ``times`` times, side by side; of a cache with stacked layers."""
    again = partial(jnp.repeat, repeats=times, axis=1)  # axis 0 is that of the layers
    kv, routers = jax.tree.map(again, (cache.kv, cache.routers))
    return KVCache(kv, routers, jnp.repeat(cache.start_B, times), cache.end)


def unstacked_cache(cache: KVCache) -> KVCache:
    """A cache of stacked layers, nested like :func:`unstacked` parameters."""
    pairs = [_parted(pair) for pair in zip(cache.kv, cache.routers, strict=True)]
    kv, routers = ([tuple(part[i] for part in parts) for parts in pairs] for i in range(2))
    return dataclasses.replace(cache, kv=kv, routers=routers)


def _parted(tree) -> tuple:
    """The parts of a pytree along the leading axis of its arrays."""
    parts = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(parts))


def router_caches(decoder: Decoder, shape: tuple[int, int]) -> RouterCaches:
    """Caches of the routers before the first of [B, S] tokens, for stacked layers."""

    def of_layer(layer: Layer, repeats: int):
        feed_forward = layer.feed_forward
        if not layer.is_moe:
            return {}
        cache = feed_forward.router.initial_cache(*shape, feed_forward.moe.num_experts)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), cache)

    return [
        [of_layer(layer, of.run.repeats) for layer in stack.layers]
        for of, stack in zip(stacks_of(decoder.config), decoder.stacks, strict=True)
    ]


def apply_layers(
    decoder: Decoder,
    stacks,
    tokens_BL,
    segment_ids_BL,
    positions_BL,
    kv,
    attend: Attend,
    routers: RouterCaches | None = None,
):
    """Embeds, passes all layers, norms.

    Args:
      decoder: embedding, norms and the structure of the layers.
      stacks: parameters, see :func:`decode_step`.
      tokens_BL: token ids.
      segment_ids_BL: 0 where no experts are to be used.
      positions_BL: positions within the documents.
      kv: what ``attend`` gets of each layer, nested like the parameters.
      attend: attention of a layer.
      routers: caches of the routers, nested alike; None: each row is a sequence from its start.

    Returns:
      the normed residual stream; the new ``kv`` and ``routers``; experts of each position, by
      layer.
    """
    positions = decoder.positions(segment_ids_BL, positions_BL, tokens_BL)
    if routers is None:
        routers = [[{} for _ in stack.layers] for stack in decoder.stacks]
        routers = [
            tuple(empty for _ in params) if isinstance(params, tuple) else empty
            for empty, params in zip(routers, stacks, strict=True)
        ]

    def one_layer(layer: Layer, stream, kv, router_cache):
        x_BLD, previous_BLS = stream
        before = positions.with_previous(previous_BLS)

        def mix(attention, heads, positions):
            projected = attention.heads_apart(heads, positions.rotary_BLR)
            mixed_BLHW, new_kv = attend(layer, kv, *projected)
            return attention.project_back(mixed_BLHW), new_kv

        out = layer(x_BLD, dataclasses.replace(before, router_cache=router_cache), mix)
        routing = out.routing
        used_BL = routing and routing.experts_per_token_T.reshape(tokens_BL.shape)
        router_cache = out.moe.router_cache if out.moe else {}
        return (out.x_BLD, out.previous_BLS), out.kv, router_cache, used_BL

    def one_group(structure, stream, inputs):
        params, kv, routers = inputs
        new, new_routers, experts_MBL = [], [], []
        layers = nnx.merge(structure, params).layers
        for layer, *caches in zip(layers, kv, routers, strict=True):
            stream, kv_of_layer, router_cache, used_BL = one_layer(layer, stream, *caches)
            new.append(kv_of_layer)
            new_routers.append(router_cache)
            experts_MBL += [] if used_BL is None else [used_BL]
        return stream, (new, new_routers, experts_MBL)

    stream = decoder.embed(tokens_BL), positions.previous_BLS
    all_kv, all_routers, all_experts = [], [], []
    for stack, *inputs in zip(decoder.stacks, stacks, kv, routers, strict=True):
        step = partial(one_group, nnx.split(stack)[0])
        if not isinstance(inputs[0], tuple):
            stream, (new, new_routers, experts_MNBL) = jax.lax.scan(step, stream, tuple(inputs))
            all_experts += experts_MNBL
        else:
            of_groups = []
            for of_group in zip(*inputs, strict=True):
                stream, results = step(stream, of_group)
                of_groups.append(results)
            new, new_routers, experts = zip(*of_groups, strict=True)
            all_experts += [jnp.stack(used) for used in zip(*experts, strict=True)]
        all_kv.append(new)
        all_routers.append(new_routers)
    if all_experts:
        experts_NBL = in_layer_order(all_experts, decoder.moe_layers)
    else:
        experts_NBL = jnp.zeros((0, *tokens_BL.shape), jnp.int32)
    return decoder.norm(stream[0]), all_kv, all_routers, experts_NBL


def _attend(
    query_BCHW: Float[Array, "B C H W"],
    key_BSGW: Float[Array, "B S G W"],
    value_BSGW: Float[Array, "B S G W"],
    visible_BCS: Bool[Array, "B C S"],
) -> Float[Array, "B C H W"]:
    """Attention of a few positions to the visible slots; scores and softmax are float32."""
    batch, length, heads, width = query_BCHW.shape
    groups = key_BSGW.shape[2]
    query_BCGRW = query_BCHW.reshape(batch, length, groups, heads // groups, width) * width**-0.5
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BGRCS = product("bcgrw,bsgw->bgrcs", query_BCGRW, key_BSGW)
    scores_BGRCS = jnp.where(visible_BCS[:, None, None], scores_BGRCS, -jnp.inf)
    probs_BGRCS = jax.nn.softmax(scores_BGRCS).astype(value_BSGW.dtype)
    mixed_BCGRW = product("bgrcs,bsgw->bcgrw", probs_BGRCS, value_BSGW)
    return mixed_BCGRW.reshape(query_BCHW.shape).astype(query_BCHW.dtype)
