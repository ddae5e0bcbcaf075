"""MoE++: zero, copy and constant experts, and routers that see the layer before (arXiv 2410.07348).

Axis legend: T tokens, D model width, E experts, C constant experts, S = E + zero, copy and constant
experts, in this order, K = k slots per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.losses.free_balance import with_groups
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits, softmax_scores
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput


@ROUTERS.register("moe_plus_plus")
@dataclasses.dataclass(frozen=True)
class MoEPlusPlus(Router):
    """A token takes the k most probable of all experts, also of those that compute next to nothing.

    A zero expert gives 0, a copy expert the token x, a constant expert a_1 x + a_2 v with
    (a_1, a_2) = softmax(W_c x) and v learned (equations 3 to 5).  Logits are W x + W_g times those
    of the MoE layer before (equation 6).

    The balance loss weighs experts by 1, and the others by tau (equation 7): where it is even, each
    expert has tau times the tokens of a free one.
    """

    k: int = model_setting(
        2, "experts per token, free ones included", unit="experts", low=1, per_layer=True
    )
    zeros: int = model_setting(1, "zero experts", low=0)
    copies: int = model_setting(1, "copy experts", low=0)
    constants: int = model_setting(2, "constant experts", low=0)
    residual: bool = model_setting(True, "add the logits of the MoE layer before, times a matrix")
    renormalize: bool = model_setting(
        False,
        "weigh zero experts by 0, and divide the other combine weights by their sum (the authors' "
        "code; the paper does not)",
    )
    tau: float = free_setting(
        0.75, "tokens of an expert over those of a free one that the loss aims at", above=0.0
    )
    losses: ClassVar = {"free_balance": 1e-2, "router_z": 0.0}
    gives = Router.gives | {"choices_TJ", "shares_TJ"}

    @property
    def free_experts(self) -> int:
        """Zero, copy and constant experts."""
        return self.zeros + self.copies + self.constants

    @property
    def reads(self) -> frozenset[str]:
        """The logits of the layer before, if asked for."""
        return frozenset({"previous_logits"} if self.residual else ())

    def describe(self) -> str:
        """Names the rule."""
        return (
            f"top-{self.k} with {self.zeros} zero, {self.copies} copy and {self.constants} "
            "constant experts"
        )

    def advice(self, wish: str) -> str:
        """Names the loss, and tau."""
        if wish == "balance":
            return "raise config.loss.free_balance.weight"
        change = "lower" if wish == "fewer" else "raise"
        return f"{change} config.model.moe.moe_plus_plus.tau={self.tau:g}"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and k tau E / (tau E + free ones) where the loss is even."""
        busy = self.tau * num_experts
        fewest = max(0, self.k - self.free_experts)
        expected = max(self.k * busy / (busy + self.free_experts), float(fewest))
        return Bounds(self.k, fewest, expected, min(float(self.k), expected + 0.25))

    def parameters(self, width: int, num_experts: int) -> dict[str, Parameter]:
        """Router, W_g (zeros: a model begins without it), W_c and v."""
        scores = num_experts + self.free_experts
        found = super().parameters(width, num_experts)
        if self.residual:
            found["residual_SS"] = Parameter((scores, scores), "zeros")
        if self.constants:
            # Two numbers of each constant expert, side by side.
            found["mix_D2C"] = Parameter((width, 2 * self.constants))
            found["constant_CD"] = Parameter((self.constants, width), jax.random.normal)
        return found

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; ``probs_TE`` and ``logits_TE`` end in those of the free experts."""
        logits_TS = masked_logits(given.logits_TE, given.valid_T)
        if self.residual and given.previous_logits_TE is not None:
            before_TS = masked_logits(given.previous_logits_TE, given.valid_T)
            precise = jax.lax.Precision.HIGHEST
            logits_TS += jnp.matmul(before_TS, params["residual_SS"].T, precision=precise)
        probs_TS, logits_TS = softmax_scores(logits_TS, given.valid_T)
        scores = logits_TS.shape[-1]
        experts = scores - self.free_experts
        _, chosen_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TS), self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], chosen_TK.shape)
        chosen_TS = jnp.any((chosen_TK[:, :, None] == jnp.arange(scores)) & keep_TK[..., None], 1)
        weight_TS = jnp.where(chosen_TS, probs_TS, 0.0)
        if self.renormalize:
            zero_S = (jnp.arange(scores) >= experts) & (jnp.arange(scores) < experts + self.zeros)
            weight_TS = jnp.where(zero_S, 0.0, weight_TS)
            total_T1 = jnp.sum(weight_TS, axis=-1, keepdims=True)
            weight_TS /= jnp.where(total_T1 > 0, total_T1, 1.0)
        routing = fill_slots(
            weight_TS, logits_TS, chosen_TK, keep_TK, renormalize=False,
            free_experts=self.free_experts,
        )  # fmt: skip
        routing = dataclasses.replace(routing, probs_TE=probs_TS)
        eta_S = jnp.where(jnp.arange(scores) < experts, 1.0, self.tau)
        routing = with_groups(routing, chosen_TS.astype(jnp.int32), eta_S * probs_TS)
        return self._with_free(params, given, routing, weight_TS[:, experts + self.zeros :])

    def _with_free(self, params, given: RouterInput, routing: Routing, weight_TX) -> Routing:
        """The routing with the weights of copy and constant experts that it is given."""
        copy_TX, constant_TC = jnp.split(weight_TX, [self.copies], axis=-1)
        free_T, extra = jnp.sum(copy_TX, axis=-1), dict(routing.extra)
        if self.constants:
            x_TD = jnp.where(given.valid_T[:, None], given.x_TD, 0).astype(jnp.float32)
            mix_TC2 = (x_TD @ params["mix_D2C"]).reshape(-1, self.constants, 2)
            kept_TC, learned_TC = jnp.moveaxis(jax.nn.softmax(mix_TC2, axis=-1), -1, 0)
            free_T += jnp.sum(constant_TC * kept_TC, axis=-1)
            extra["constant_TC"] = constant_TC * learned_TC
        return dataclasses.replace(routing, free_T=free_T, extra=extra)

    def free_output(self, params, x_TD, routing: Routing):
        """Copies of the token, and constants."""
        free_TD = super().free_output(params, x_TD, routing)
        if not self.constants:
            return free_TD
        return free_TD + routing.extra["constant_TC"] @ params["constant_CD"]
