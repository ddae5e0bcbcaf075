"""Soft routing: every slot of an expert holds a mean of all tokens of a group.

Soft MoE (arXiv 2308.00951), and SpheroMoE, its normalized form (MoE Jetpack, arXiv 2406.04801).

Axis legend: T tokens, E experts, D model width, C slots of an expert in a group, Z = E C slots, G
groups, L tokens of a group.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import SoftSlots, masked_logits
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput


class _SlotRouter(Router):
    """Common part of routers of soft slots: groups, and the two softmaxes."""

    slots: int
    group: str
    causal: ClassVar = False
    chooses: ClassVar = False
    losses: ClassVar = {"router_z": 0.0}
    gives = frozenset({"distribution", "softmax", "logits"})

    def advice(self, wish: str) -> str:
        """Names the number of slots; their load is even by itself."""
        return "change the slots of an expert"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts, for every token."""
        experts = num_experts
        return Bounds(experts, experts, float(experts), float(experts))

    def parameters(self, width: int, num_experts: int):
        """A column for each slot, those of one expert side by side."""
        return {"router_DE": Parameter((width, num_experts * self.slots))}

    def mixed(
        self, logits_TZ: Float[Array, "T Z"], given: RouterInput, temperatures=(1.0, 1.0)
    ) -> SoftSlots:
        """Softmax over the tokens of a group for dispatch, over all slots for combining.

        Args:
          logits_TZ: of the slots, of valid tokens alone.
          given: as to the router.
          temperatures: what logits are divided by before either softmax.
        """
        tokens = logits_TZ.shape[0]
        length = given.length if self.group == "sequence" and given.length else tokens
        of_dispatch, of_combine = temperatures
        valid_GL1 = given.valid_T.reshape(-1, length, 1)
        dispatch_GLZ = (logits_TZ / of_dispatch).reshape(-1, length, logits_TZ.shape[1])
        # By hand: the softmax over a group without a valid token would be 0 / 0.
        open_GLZ = jnp.where(valid_GL1, jax.lax.stop_gradient(dispatch_GLZ), -jnp.inf)
        largest_G1Z = jnp.max(open_GLZ, axis=1, keepdims=True)
        largest_G1Z = jnp.where(jnp.isfinite(largest_G1Z), largest_G1Z, 0.0)
        below_GLZ = jnp.where(valid_GL1, dispatch_GLZ - largest_G1Z, 0.0)
        share_GLZ = jnp.where(valid_GL1, jnp.exp(below_GLZ), 0.0)
        total_G1Z = jnp.sum(share_GLZ, axis=1, keepdims=True)
        share_GLZ /= jnp.where(total_G1Z > 0, total_G1Z, 1.0)
        combine_TZ = jax.nn.softmax(logits_TZ / of_combine, axis=-1)

        def by_expert(x_TZ):
            return x_TZ.reshape(tokens, -1, self.slots)

        return SoftSlots(
            by_expert(share_GLZ),
            by_expert(jnp.where(given.valid_T[:, None], combine_TZ, 0.0)),
            jnp.sum(by_expert(combine_TZ), axis=-1),
            jax.nn.logsumexp(by_expert(logits_TZ / of_combine), axis=-1),
            length=0 if length == tokens else length,
        )


def _slots_setting():
    return model_setting(1, "slots of an expert in each group", unit="slots", low=1)


def _group_setting():
    return model_setting(
        "sequence",
        "the tokens that slots are means of: of one sequence, or of the whole batch",
        choices=("sequence", "batch"),
    )


@ROUTERS.register("soft")
@dataclasses.dataclass(frozen=True)
class Soft(_SlotRouter):
    """Experts compute means of tokens, shared out by softmaxes over tokens and over slots.

    Logits are x phi, with a column of phi for each slot (equations 1 to 3).
    """

    slots: int = _slots_setting()
    group: str = _group_setting()

    def describe(self) -> str:
        """Names the rule."""
        return f"soft, {self.slots} slots of an expert in each {self.group},"

    def __call__(self, params, given: RouterInput) -> SoftSlots:
        """Mixes T tokens."""
        return self.mixed(masked_logits(given.logits_TE, given.valid_T), given)


@ROUTERS.register("sphero")
@dataclasses.dataclass(frozen=True)
class Sphero(_SlotRouter):
    """Soft routing by cosines: neither softmax depends on the length of a token's vector.

    Logits are the cosines of x and the layer norm of phi, divided by a learned temperature for
    either softmax (SpheroMoE).
    """

    slots: int = _slots_setting()
    group: str = _group_setting()
    grows: ClassVar = False  # the layer norm of slots is over all units of the width
    temperature: float = model_setting(
        1.0, "first value of the learned temperatures of both softmaxes", above=0.0
    )
    noise: float = model_setting(
        1.0, "standard deviation of the noise on logits in training, times E; 0 = none", low=0.0
    )

    @property
    def reads(self) -> frozenset[str]:
        """Noise, if there is any."""
        return frozenset({"noise"} if self.noise else ())

    def describe(self) -> str:
        """Names the rule."""
        return f"soft spherical, {self.slots} slots of an expert in each {self.group},"

    def parameters(self, width: int, num_experts: int):
        """Orthogonal slots, their layer norm, and logarithms of both temperatures."""
        orthogonal = jax.nn.initializers.orthogonal()
        first = jnp.log(jnp.float32(self.temperature))

        def temperature(_, shape):
            return jnp.full(shape, first)

        return {
            "router_DE": Parameter((width, num_experts * self.slots), orthogonal),
            "slot_scale_D": Parameter((width,), "ones", decay=False),
            "slot_bias_D": Parameter((width,), "zeros", decay=False),
            "log_dispatch": Parameter((), temperature, decay=False),
            "log_combine": Parameter((), temperature, decay=False),
        }

    def logits(self, params, x_TD, num_experts):
        """Cosines of tokens and slots."""
        slot_ZD = jax.nn.standardize(params["router_DE"], axis=0, epsilon=1e-5).T
        slot_ZD = slot_ZD * params["slot_scale_D"] + params["slot_bias_D"]
        return _unit(x_TD.astype(jnp.float32)) @ _unit(slot_ZD).T

    def __call__(self, params, given: RouterInput) -> SoftSlots:
        """Mixes T tokens."""
        logits_TZ = masked_logits(given.logits_TE, given.valid_T)
        if self.noise and given.training:
            slots = logits_TZ.shape[1:]
            experts = slots[0] // self.slots
            noise_TZ = given.draws(lambda key: jax.random.normal(key, slots))
            logits_TZ = masked_logits(logits_TZ + self.noise / experts * noise_TZ, given.valid_T)
        temperatures = [jnp.exp(params[name]) for name in ("log_dispatch", "log_combine")]
        return self.mixed(logits_TZ, given, temperatures)


def _unit(x_XD: Float[Array, "X D"]) -> Float[Array, "X D"]:
    """Vectors of length 1."""
    square_X1 = jnp.sum(jnp.square(x_XD), axis=-1, keepdims=True)
    return x_XD * jax.lax.rsqrt(jnp.maximum(square_X1, 1e-12))
