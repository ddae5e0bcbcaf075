"""The Mixture-of-Experts feed-forward of a layer: experts chosen by a router.

Axis legend: B batch, L positions, T = B L tokens, D model width, E experts, F hidden width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.experts import (
    ExpertWeights,
    StackedView,
    apply_experts,
    make_backend,
    make_transport,
)
from dynmoe_jax.mesh.axes import EXPERT, batch_devices, mesh_sizes
from dynmoe_jax.mesh.sharding import by_token, whole_parameter
from dynmoe_jax.model.adjugate import AdjugateExperts
from dynmoe_jax.model.components import RouterState, added, compute_dtype, drawn, matrix
from dynmoe_jax.model.dense_feed_forward import swiglu_of_all
from dynmoe_jax.model.inputs import TokenPositions, TrainingInput
from dynmoe_jax.model.kernels.norm.norm import forked
from dynmoe_jax.model.kernels.norm.router_logits import logits_of, norm_and_logits
from dynmoe_jax.model.masks import full, masked_rows, on_stream
from dynmoe_jax.model.output import LayerSums, MoERecord, layer_sums
from dynmoe_jax.registry import chosen
from dynmoe_jax.routing import ExpertSlots, RouterInput, Routing, SoftSlots
from dynmoe_jax.routing.normalize import normalized_logits
from dynmoe_jax.routing.record import masked_logits
from dynmoe_jax.routing.regularizers import Regularizer
from dynmoe_jax.routing.router import OUTPUTS, READABLE, Params
from dynmoe_jax.routing.transforms import chain, dropped

Weights = ExpertWeights | dict[str, Array]
"""All experts of a layer, as backends take them."""


class MoEFeedForward(nnx.Module):
    """A router, the experts it chooses from, and an expert that all tokens share if asked for.

    The shared expert is DeepSeekMoE's (arXiv 2401.06066; several of them are one wide one), with
    a gate Qwen2-MoE's (arXiv 2407.10671).
    """

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        D, E, F = model.width, model.moe.num_experts, model.moe.hidden_width
        self.kind = model.moe.expert_kind
        self.moe, self.dtype = model.moe, compute_dtype(model)
        self.router, self.regularizers = model.moe.route, chosen(model.moe, "regularizers")
        self.reads = self.router.reads.union(*(each.reads for each in self.regularizers))
        if unknown := self.reads - READABLE:
            raise config.ConfigError(
                f"config.model.moe.router={model.moe.router!r} reads {', '.join(sorted(unknown))}, "
                f"which nothing makes; a router may read {', '.join(sorted(READABLE))}."
            )
        declared = self.router.parameters(D, E)
        self.router_names = tuple(declared)
        for name, parameter in declared.items():
            setattr(self, name, drawn(rngs, parameter, model.init_std))
        state = self.router.layer_state(D, E)
        self.state_names = tuple(state)
        for name, array in state.items():
            setattr(self, name, RouterState(array))
        experts = self.kind.parameters(D, E, F)
        self.expert_names = tuple(experts)
        for name, parameter in experts.items():
            setattr(self, name, drawn(rngs, parameter, model.init_std))
        if model.moe.shared_hidden_width:
            shared = model.moe.shared_hidden_width
            self.shared_gate_up_D2F = matrix(rngs, (D, 2 * shared), model.init_std)
            self.shared_down_FD = matrix(rngs, (shared, D), model.init_std)
        if model.moe.shared_gate:
            self.shared_router_D1 = matrix(rngs, (D, 1), model.init_std)
        self.adjugates = AdjugateExperts(model, rngs=rngs) if model.moe.adjugate_width else None
        self.mask_F = full(F) if model.mask_steps else None
        shared = model.moe.shared_hidden_width
        self.shared_mask_F = full(shared) if model.mask_steps and shared else None
        self.plain = model.plain
        self.backend = make_backend(model.moe, plain=model.plain)
        self.transforms = chosen(model.moe, "transforms")

    def weights(self, stacked: StackedView | None = None) -> Weights:
        """All experts, in the compute type.

        Args:
          stacked: where these are among the experts of all layers, if that is known.
        """
        arrays = {name: x.astype(self.dtype) for name, x in self._expert_arrays().items()}
        if not self.kind.stored_dense:
            return arrays
        return dataclasses.replace(self.kind.dense(arrays), stacked=stacked)

    def _expert_arrays(self) -> dict[str, Array]:
        """Arrays of all experts, those behind hidden units with their mask."""
        arrays = {name: getattr(self, name)[...] for name in self.expert_names}
        if self.mask_F is None:
            return arrays
        return {name: masked_rows(name, array, self.mask_F) for name, array in arrays.items()}

    def dense_matrices(self) -> tuple[Array, Array]:
        """The arrays of experts that are stored as kernels read them, as they are stored."""
        arrays = {name: getattr(self, name)[...] for name in self.expert_names}
        weights = self.kind.dense(arrays)
        return weights.gate_up_ED2F, weights.down_EFD

    def router_parameters(self) -> dict[str, Array]:
        """Parameters of the router by name, whole, float32."""
        return {
            name: whole_parameter(name, getattr(self, name)[...], jnp.float32)
            for name in self.router_names
        }

    def project(
        self, norm: nnx.RMSNorm, x_BLD: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "T D"], Float[Array, "T E"]]:
        """(the stream, the tokens of its norm, the router's logits).

        Args:
          norm: of what the experts get.
          x_BLD: the stream.
        """
        params = self.router_parameters()
        if self.router.logits is None:
            x_BLD, normed_BLD, logits_BLE = norm_and_logits(
                norm, x_BLD, params["router_DE"], self.plain
            )
            flat = (a.reshape(-1, a.shape[-1]) for a in (normed_BLD, logits_BLE))
            return x_BLD, *flat
        x_BLD, normed_BLD = forked(norm, x_BLD, self.plain)
        normed_TD = normed_BLD.reshape(-1, x_BLD.shape[-1])
        return x_BLD, normed_TD, self.router.logits(params, normed_TD, self.moe.num_experts)

    def added_to(
        self,
        x_BLD: Float[Array, "B L D"],
        norm: nnx.RMSNorm,
        positions: TokenPositions,
        weights: Weights | None,
    ) -> tuple[Float[Array, "B L D"], MoERecord]:
        """Returns (the stream plus what the experts of its norm add, the record).

        Args:
          x_BLD: the residual stream.
          norm: of what the router and the experts read.
          positions: of the tokens; one that is not valid uses no expert.
          weights: what :meth:`weights` returned.
        """
        x_BLD, normed_TD, logits_TE = self.project(norm, x_BLD)
        y_TD, record = self(normed_TD, logits_TE, positions, weights)
        y_TD = on_stream(norm, y_TD)
        x_TD = added(x_BLD.reshape(y_TD.shape), y_TD, self.plain)
        return x_TD.reshape(x_BLD.shape), record

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        logits_TE: Float[Array, "T E"],
        positions: TokenPositions,
        weights: Weights | None = None,
    ) -> tuple[Float[Array, "T D"], MoERecord]:
        """Returns (y_TD, the record of the routing).

        Args:
          x_TD: tokens.
          logits_TE: what :meth:`project` returned.
          positions: of the tokens; one that is not valid uses no expert.
          weights: what :meth:`weights` returned.
        """
        routing, kept, sums, dropped, cache = self.route(x_TD, logits_TE, positions)
        if isinstance(routing, SoftSlots):
            y_TD, more = self._softly(x_TD, routing, positions, weights)
        else:
            y_TD, more = self._experts(x_TD, kept, weights)
            free_TD = self.router.free_output(self.router_parameters(), x_TD, kept)
            if free_TD is not None:
                y_TD += (self.moe.routed_scale * free_TD).astype(y_TD.dtype)
            if self.adjugates is not None:
                adjugate_TD, adjugates_dropped = self.adjugates(x_TD, kept, self.row_bound)
                y_TD, more = y_TD + adjugate_TD, more + adjugates_dropped
        if self.moe.shared_hidden_width:
            y_TD += self.shared(x_TD)
        kept_T = kept.experts_per_token_T
        return y_TD, MoERecord(routing, sums, dropped + more, kept_T, cache)

    def _experts(
        self, x_TD: Float[Array, "T D"], kept: Routing, weights: Weights | None
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        """(sum of the experts of each token, rows dropped)."""
        if self.moe.routed_scale != 1.0:
            scaled_TK = self.moe.routed_scale * kept.weight_TK
            kept = dataclasses.replace(kept, weight_TK=scaled_TK)
        return apply_experts(
            x_TD,
            kept,
            weights or self.weights(),
            self.backend,
            self.row_bound,
            make_transport(self.moe, mesh_sizes()[EXPERT]),
            self.kind.splits_hidden,
        )

    def _softly(
        self,
        x_TD: Float[Array, "T D"],
        soft: SoftSlots,
        positions: TokenPositions,
        weights: Weights | None,
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        """(sum of the slots' outputs for each token, rows dropped): the experts compute slots."""
        whole = self.router.group == "batch"

        def dispatch(arrays, _):
            x_TD, valid_T, soft = arrays
            # A token that is padding may hold anything, and 0 * NaN is NaN.
            x_TD = jnp.where(valid_T[:, None], x_TD, 0)
            slots_SD = soft.slot_inputs(x_TD).astype(x_TD.dtype)
            # Slots of all devices together are divided among them again.
            missing = -len(slots_SD) % batch_devices(mesh_sizes()) if whole else 0
            slots_SD = jnp.pad(slots_SD, [(0, missing), (0, 0)])
            return slots_SD, soft.slots_by_token(missing)

        def combine(arrays, _):
            soft, y_SD = arrays
            return soft.token_outputs(y_SD[: soft.num_slots]).astype(y_SD.dtype)

        valid_T = positions.segment_ids_BL.reshape(-1) > 0
        slots_SD, routing = by_token(dispatch, (x_TD, valid_T, soft), whole=whole)
        y_SD, dropped = self._experts(slots_SD, routing, weights)
        return by_token(combine, (soft, y_SD), whole=whole), dropped

    def row_bound(self, tokens: int, rows: int) -> int:
        """Most rows of the tokens of a device that the transforms leave, of so many slots."""
        for transform in self.transforms:
            rows = transform.row_bound(tokens, rows, self.moe.num_experts)
        return rows

    def route(
        self, x_TD: Float[Array, "T D"], logits_TE: Float[Array, "T E"], positions: TokenPositions
    ) -> tuple[Routing, Routing, LayerSums, Int[Array, ""], Params]:
        """(routing, the same behind the transforms, sums over tokens, pairs that those dropped,
        the router's cache with these tokens).

        The router sees the tokens of one device, or, where its ``group`` says so, those of all.
        """
        tokens = self._read(x_TD, logits_TE, positions)
        state = {name: getattr(self, name)[...] for name in self.state_names}
        shared = self.router_parameters(), state, self._held(positions)
        length = positions.segment_ids_BL.shape[1]
        training = positions.training

        regularizers = [each for each in self.regularizers if _applies(each, training)]

        def given(tokens, state, held=None):
            return RouterInput(
                **tokens,
                **(held or {}),
                state=state,
                expected=self.router.bounds(self.moe.num_experts).expected,
                length=length,
                num_experts=self.moe.num_experts,
                training=training is not None,
            )

        def choose(tokens, shared):
            params, state, held = shared
            seen = self._seen(params, given(tokens, state, held), regularizers)
            routing = self.router(params, seen)
            if isinstance(routing, ExpertSlots):
                routing = routing.by_token()
            for regularizer in regularizers:
                routing = regularizer.behind(routing, seen)
            sums = layer_sums(self.router, params, seen, routing, training)
            cache = self.router.next_cache(params, seen, routing) if seen.cache else {}
            return routing, jax.tree.map(lambda x: x[None], sums), cache

        def transform(arrays, state):
            tokens, routing = arrays
            kept = chain(self.transforms, routing, given(tokens, state))
            return kept, dropped(routing, kept)[None]

        whole = self.router.group == "batch"
        routing, sums, cache = by_token(choose, tokens, shared, whole)
        if training is not None:
            sums = self._with_losses_of_experts(sums, routing, given(tokens, state), training)
        if isinstance(routing, SoftSlots) == self.router.chooses:
            raise TypeError(
                f"The router {self.moe.router!r} returns {type(routing).__name__}, and declares "
                f"chooses = {self.router.chooses}; change one of them."
            )
        if not self.transforms:
            return routing, routing, sums, jnp.zeros((), jnp.int32), cache
        kept, dropped_M = by_token(transform, (tokens, routing), state)
        return routing, kept, sums, jnp.sum(dropped_M), cache

    def _with_losses_of_experts(
        self, sums: LayerSums, routing: Routing, seen: RouterInput, training: TrainingInput
    ) -> LayerSums:
        """The sums with those of losses that need parameters of experts, or what they give, of all
        devices at once."""
        names = {*self.expert_names, OUTPUTS}
        losses = [(name, loss) for name, loss in training.losses if loss.needs & names]
        if not losses:
            return sums
        if training.key is not None:
            seen = dataclasses.replace(seen, layer_key=training.layer_key())
        experts = self._expert_arrays()
        params = self.router_parameters() | experts
        seen = dataclasses.replace(seen, output=partial(self._output, experts, seen.x_TD))
        found = {
            name: jax.tree.map(lambda x: x[None], loss.sums(routing, seen, params))
            for name, loss in losses
            if loss.needs <= self.router.gives | params.keys() | {OUTPUTS}
        }
        return dataclasses.replace(sums, losses={**sums.losses, **found})

    def _output(
        self, experts: Mapping[str, Array], x_TD: Float[Array, "T D"], e: Int[Array, ""]
    ) -> Float[Array, "T D"]:
        """Output of an expert for all tokens, of the arrays of all experts."""
        own = {name: array[e].astype(self.dtype) for name, array in experts.items()}
        return self.kind.apply(own, x_TD.astype(self.dtype))

    def _read(self, x_TD, logits_TE, positions) -> dict[str, Array]:
        """The arrays of tokens that router and losses read, by their names in
        :class:`RouterInput`."""
        read = {"valid_T": positions.segment_ids_BL.reshape(-1) > 0, "logits_TE": logits_TE}
        read |= {"x_TD": x_TD, "cache": positions.router_cache}
        training = positions.training
        losses = () if training is None else training.losses
        reads = self.reads.union(*(loss.reads for _, loss in losses))
        if "token_ids" in reads:
            read["token_id_T"] = positions.token_ids_BL.reshape(-1)
        if "segments" in reads:
            read["segment_id_T"] = positions.segment_ids_BL.reshape(-1)
        if "previous_logits" in self.router.reads:
            read["previous_logits_TE"] = positions.previous_TS(
                self.moe.num_experts, self.router.free_experts
            )
        if "noise" in self.reads and _draws(training):
            read["key_T"] = training.key_T(positions.segment_ids_BL.shape[1])
        return read

    def _held(self, positions: TokenPositions) -> dict[str, Array]:
        """The step and a key that all its tokens share, where somebody reads them."""
        training = positions.training
        if "step" not in self.reads or not _draws(training):
            return {}
        return {"run_key": training.run_key(), "step": training.key.step}

    def _seen(
        self, params: dict[str, Array], given: RouterInput, regularizers: Sequence[Regularizer]
    ) -> RouterInput:
        """The input of the router: with normalized logits, and disturbed by the regularizers."""

        def normalized(logits_TE):
            if not self.moe.normalized_logits:
                return logits_TE
            masked_TE = masked_logits(logits_TE, given.valid_T)
            return normalized_logits(masked_TE, self.moe.normalized_logits)

        def scores(x_TD):
            if self.router.logits is not None:
                return normalized(self.router.logits(params, x_TD, self.moe.num_experts))
            return normalized(logits_of(x_TD, params["router_DE"]))

        given = dataclasses.replace(given, logits_TE=normalized(given.logits_TE))
        for regularizer in regularizers:
            given = regularizer(given, scores)
        return given

    def shared(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Computes what the shared expert adds to every token."""
        matrices = self.shared_gate_up_D2F[...], self.shared_down_FD[...]
        if self.shared_mask_F is not None:
            down_FD = masked_rows("shared_down_FD", matrices[1], self.shared_mask_F)
            matrices = matrices[0], down_FD
        y_TD = swiglu_of_all(x_TD, *matrices, self.dtype, self.plain)
        if not self.moe.shared_gate:
            return y_TD
        router_D1 = whole_parameter("shared_router_D1", self.shared_router_D1[...], self.dtype)
        return y_TD * jax.nn.sigmoid(x_TD @ router_D1)


def _draws(training: TrainingInput | None) -> bool:
    """Whether anything is drawn in this pass."""
    return training is not None and training.key is not None


def _applies(regularizer: Regularizer, training: TrainingInput | None) -> bool:
    """Whether a regularizer is called in this pass."""
    return training is not None and (_draws(training) or not regularizer.reads)
