"""The decoder: embed, N layers of attention and feed-forward, norm, logits.

Layers are stacked and scanned, so compile time does not grow with depth; a few on a CPU are
unrolled (:func:`groups_at_a_time`).  Where every n-th layer is MoE, the scanned unit is a group of
n layers.  Dense layers before all others are a stack of their own, and so is every run of layers
where ``config.model.layers`` makes them differ (:mod:`.stacks`).

Axis legend: B batch, L positions, T = B L tokens, D model width, V vocabulary, N MoE layers,
E experts, K slots per token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.experts import StackedView, reads_in_stack
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target, current_target
from dynmoe_jax.mesh.axes import on_one_device
from dynmoe_jax.mesh.sharding import embedded, split_by_batch, whole_parameter
from dynmoe_jax.model.components import compute_dtype, matrix, rms_norm
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.inputs import TokenPositions, TrainingInput, room_for_previous
from dynmoe_jax.model.layer import Layer, LayerOutput
from dynmoe_jax.model.masks import on_stream
from dynmoe_jax.model.output import DecoderOutput, LayerRouting, MoERecord, routing_of_layers
from dynmoe_jax.model.periods import Run
from dynmoe_jax.model.remat import remat_policy
from dynmoe_jax.model.rotary import rotary_table
from dynmoe_jax.model.stacks import Stack, stacks_of

UNROLLED_GROUPS = 12


def groups_at_a_time(model: config.Model, groups: int, in_all: int = 0) -> int:
    """Number of groups of layers that one iteration of the loop over all of them computes.

    Args:
      model: the settings.
      groups: that the loop is over.
      in_all: groups of all loops together, where there are more.

    ``config.model.unroll``, if it is set.  Otherwise all of up to 12 on one CPU with kernels of our
    own or on one GPU, and one anywhere else.  There a loop copies what each layer saves for
    backward into a stack that starts as zeros, and out of it again.  Unrolled, a step is faster and
    needs less memory, but the more layers, the longer it takes to compile (docs/measurements.md:
    cpu-unrolled, cpu-unrolled-compile, h100-unrolled, h100-unrolled-compile).
    """
    if model.unroll:
        return model.unroll
    if max(groups, in_all) > UNROLLED_GROUPS or not on_one_device():
        return 1
    platform = current_target().platform
    kernels = compute_dtype(model) == jnp.float32 and library.available()
    return groups if platform == "gpu" or (platform == "cpu" and kernels) else 1


Taps = Callable[[LayerOutput], Any]
"""Picks or reduces results of a layer: a tree of arrays; None: nothing of it.  Under ``jit``, what
it leaves out is not kept."""


def keep_record(output: LayerOutput) -> MoERecord:
    """Keeps all of the routing, which for many layers and experts is much memory
    (docs/measurements.md: routing-records)."""
    return output.moe


class LayerGroup(nnx.Module):
    """The scanned unit: a period of layers, of which some are MoE."""

    def __init__(self, period: Sequence[LayerSettings], *, rngs: nnx.Rngs):
        self.layers = nnx.List(Layer(of.model, of.is_moe, rngs=rngs) for of in period)

    def __call__(self, x_BLD, positions, taps: Taps, first: Int[Array, ""] | int, stacked=None):
        """Returns (x_BLD, the tokens as the next group reads them, what ``taps`` picked).

        Args:
          x_BLD: the residual stream.
          positions: of its tokens.
          taps: see :data:`Taps`.
          first: number of the group's first layer in the decoder.
          stacked: for each MoE layer, where its experts lie among those of all groups, or None; or
            None for all.
        """
        tapped, places = [], iter(stacked or ())
        for i, layer in enumerate(self.layers):
            place = next(places, None) if layer.is_moe else None
            output = layer(x_BLD, positions.at_layer(first + i), stacked=place)
            x_BLD, positions = output.x_BLD, positions.with_previous(output.previous_BLS)
            tapped.append(taps(output))
        return x_BLD, positions, [each for each in tapped if each is not None]


class Decoder(nnx.Module):
    """A Llama-style decoder with Top-P (or other) Mixture-of-Experts feed-forwards."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        """Draws the parameters: every matrix from N(0, init_std^2), norms at one.

        Raises:
          ConfigError: the router is not causal.
        """
        _check_causal(model)
        self.config = model
        self.embedding_VD = matrix(rngs, (model.vocab_size, model.width), model.init_std)
        for stack in stacks_of(model):
            setattr(self, stack.name, _stacked(stack.run, rngs))
        self.norm = rms_norm(model, rngs)
        if not model.tie_embeddings:
            self.head_DV = matrix(rngs, (model.width, model.vocab_size), model.init_std)

    @property
    def output_DV(self) -> Float[Array, "D V"]:
        """The output projection, in the compute type."""
        head = self.embedding_VD[...].T if self.config.tie_embeddings else self.head_DV[...]
        return head.astype(compute_dtype(self.config))

    @property
    def stacks(self) -> list[LayerGroup]:
        """All layers in the order of computation: stacks of groups."""
        return [getattr(self, stack.name) for stack in stacks_of(self.config)]

    def embed(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The residual stream before the first layer, in the compute type."""
        dtype = compute_dtype(self.config)
        x_BLD = embedded("embedding_VD", self.embedding_VD[...], tokens_BL, dtype)
        return split_by_batch(on_stream(self.norm, x_BLD))

    def rotary(self, positions_BL: Int[Array, "B L"]) -> Float[Array, "B L R"]:
        """The angles by which layers with heads of the usual width rotate queries and keys."""
        return rotary_table(positions_BL, self.config.head_width, self.config.rope_theta)

    def positions(
        self,
        segment_ids_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        tokens_BL: Int[Array, "B L"],
        training: TrainingInput | None = None,
    ) -> TokenPositions:
        """The tokens of a batch, as all layers may read them; arguments as for :meth:`tapped`."""
        widths = {layer.model.head_width for layer in self.config.by_layer}
        other = {
            width: rotary_table(positions_BL, width, self.config.rope_theta)
            for width in sorted(widths - {self.config.head_width})
        }
        moe = [layer.model.moe for layer in self.config.by_layer if layer.is_moe]
        previous_BLS = None
        if scores := room_for_previous([(each.route, each.num_experts) for each in moe]):
            previous_BLS = split_by_batch(jnp.zeros((*tokens_BL.shape, scores), jnp.float32))
        rotary_BLR = self.rotary(positions_BL)
        return TokenPositions(
            segment_ids_BL,
            rotary_BLR,
            tokens_BL,
            training,
            other_rotary=other,
            previous_BLS=previous_BLS,
        )

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        segment_ids_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerRouting | None]:
        """All of the decoder but the output projection.

        Args:
          tokens_BL: token ids.
          segment_ids_BL: which document a position belongs to; 0 is padding.  None: one document.
          positions_BL: position within the document; None: 0, 1, 2, …

        Returns:
          the normed residual stream, and the routing of the MoE layers (None if dense).
        """
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        x_BLD, records = self.tapped(tokens_BL, segment_ids_BL, positions_BL, keep_record)
        return x_BLD, routing_of_layers(records, self.moe_layers, segment_ids_BL > 0)

    def tapped(
        self,
        tokens_BL: Int[Array, "B L"],
        segment_ids_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        taps: Taps,
        training: TrainingInput | None = None,
    ) -> tuple[Float[Array, "B L D"], list[Any]]:
        """All of the decoder but the output projection, and what is asked for of its layers.

        Args:
          tokens_BL: token ids.
          segment_ids_BL: as for :meth:`hidden`.
          positions_BL: as for :meth:`hidden`.
          taps: picks or reduces results of a layer.
          training: inputs of layers in training.

        Returns:
          the normed residual stream; results of ``taps`` in the order of :attr:`programs`, without
          those that are None, each with a leading axis over the layers that are computed by one
          program.
        """
        positions = self.positions(segment_ids_BL, positions_BL, tokens_BL, training)
        x_BLD, records = self.embed(tokens_BL), []
        for stack in stacks_of(self.config):
            x_BLD, positions, tapped = self._scan(stack, x_BLD, positions, taps)
            records += tapped
        return self.norm(x_BLD), records

    @property
    def moe_feed_forwards(self) -> list[MoEFeedForward]:
        """The MoE feed-forwards, each stacked over the layers that one program computes."""
        layers = [layer for stack in self.stacks for layer in stack.layers]
        return [layer.feed_forward for layer in layers if layer.is_moe]

    @property
    def keeps_router_cache(self) -> bool:
        """Whether the routing of a token depends on those before it in its row."""
        return any(layer.router.keeps_cache for layer in self.moe_feed_forwards)

    @property
    def moe_layers(self) -> list[range]:
        """Numbers of the MoE layers, those together that are computed by one program."""
        return [numbers for numbers, is_moe in self.programs if is_moe]

    @property
    def dense_layers(self) -> list[range]:
        """Numbers of the dense layers, likewise."""
        return [numbers for numbers, is_moe in self.programs if not is_moe]

    @property
    def programs(self) -> list[tuple[range, bool]]:
        """(numbers of layers that are computed by one program, whether they are MoE), in order."""
        return [
            (stack.layers_at(place), layer.is_moe)
            for stack in stacks_of(self.config)
            for place, layer in enumerate(stack.run.period)
        ]

    def _scan(
        self,
        stack: Stack,
        x_BLD,
        positions: TokenPositions,
        taps: Taps,
    ):
        """(x_BLD behind all groups of a stack, the tokens as the next stack reads them, what
        ``taps`` picked, stacked)."""
        groups: LayerGroup = getattr(self, stack.name)
        structure, params = nnx.split(groups)
        whole = self._stacked_experts(groups)
        first, period = stack.first, len(stack.run.period)

        def apply_group(stream, inputs):
            (x_BLD, previous_BLS), (params, i) = stream, inputs
            stacked = [matrices and StackedView(*matrices, i) for matrices in whole]
            group = nnx.merge(structure, params)
            before = positions.with_previous(previous_BLS)
            x_BLD, behind, tapped = group(x_BLD, before, taps, first + i * period, stacked)
            return jax.tree.map(split_by_batch, (x_BLD, behind.previous_BLS)), tapped

        policy = remat_policy(self.config.remat)
        if policy:
            apply_group = jax.checkpoint(apply_group, policy=policy, prevent_cse=False)
        repeats = stack.run.repeats
        # Each program that layers which differ need is one more to compile (docs/measurements.md:
        # cpu-unlike-layers-compile).
        in_all = sum(each.run.repeats for each in stacks_of(self.config) if self.config.layers)
        unroll = groups_at_a_time(self.config, repeats, in_all)
        stream, inputs = (x_BLD, positions.previous_BLS), (params, jnp.arange(repeats))
        (x_BLD, previous_BLS), tapped = jax.lax.scan(apply_group, stream, inputs, unroll=unroll)
        return x_BLD, positions.with_previous(previous_BLS), tapped

    def _stacked_experts(self, groups: LayerGroup) -> list[tuple[Array, Array] | None]:
        """The matrices of all experts of each MoE layer of a period, where kernels read them in
        their place; else None."""
        model, dtype = self.config, compute_dtype(self.config)
        moe = [layer.feed_forward for layer in groups.layers if layer.is_moe]
        # Gradients reach the layers' own weights.
        return [
            jax.tree.map(jax.lax.stop_gradient, layer.dense_matrices())
            if layer.mask_F is None and reads_in_stack(layer.moe, model.width, dtype, model.plain)
            else None
            for layer in moe
        ]

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segment_ids_BL: Int[Array, "B L"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
    ) -> DecoderOutput:
        """Logits of the next token at every position; arguments as in :meth:`hidden`."""
        x_BLD, routing = self.hidden(tokens_BL, segment_ids_BL, positions_BL)
        return DecoderOutput(self.logits(x_BLD), routing)

    def logits(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits, float32, of what :meth:`hidden` returns."""
        output_DV = whole_parameter("output_DV", self.output_DV, x_BLD.dtype)
        return jnp.einsum("bld,dv->blv", x_BLD, output_DV, preferred_element_type=jnp.float32)


def _stacked(run: Run[LayerSettings], rngs: nnx.Rngs) -> LayerGroup:
    """One LayerGroup whose parameters carry a leading axis over the groups."""

    @nnx.split_rngs(splits=run.repeats)
    @nnx.vmap(in_axes=0, out_axes=0, axis_size=run.repeats)
    def make(rngs):
        return LayerGroup(run.period, rngs=rngs)

    return make(rngs)


def _check_causal(model: config.Model) -> None:
    for moe in dict.fromkeys(model.moe_settings):
        if moe.allow_non_causal or (moe.route.causal and moe.route.causal_in_training):
            continue
        where = (
            "in training; " if moe.route.causal else "which a decoder cannot when it generates; "
        )
        raise config.ConfigError(
            f"config.model.moe.router={moe.router!r} looks at later tokens, {where}use a causal "
            "router such as top_p, or set config.model.moe.allow_non_causal."
        )


def decoder_structure(model: config.Model) -> nnx.GraphDef:
    """Structure from which :func:`nnx.merge` makes a decoder of parameters."""
    return _shapes(model, current_target(), jax.sharding.get_abstract_mesh())[0]


def parameter_shapes(model: config.Model) -> nnx.State:
    """Shapes of all parameters, without allocating any."""
    return nnx.state(decoder_shapes(model), nnx.Param)


def variable_shapes(model: config.Model) -> nnx.State:
    """Shapes of all parameters and router states, without allocating any."""
    return nnx.state(decoder_shapes(model))


def decoder_shapes(model: config.Model) -> Decoder:
    """A decoder of shapes in place of arrays."""
    structure, shapes = _shapes(model, current_target(), jax.sharding.get_abstract_mesh())
    # Variables of its own: whoever is given one may change it.
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf, shapes))


@functools.lru_cache(maxsize=32)
def _shapes(model: config.Model, target: Target, mesh: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """(structure, shapes) of a decoder that is built for a target, under a mesh."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
