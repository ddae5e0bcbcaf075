"""Language model with feed-forwards whose hidden units are mostly off, as D2DMoE begins (arXiv
2310.04361).

A feed-forward of which few units are on at a time loses less when it is split into experts.

Axis legend: B batch, L positions, F hidden width, N dense layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.fields import run_setting
from dynmoe_jax.registry import OBJECTIVES
from dynmoe_jax.training.objectives.language_model import LanguageModel


@OBJECTIVES.register("sparsify")
@dataclasses.dataclass(frozen=True)
class Sparsify(LanguageModel):
    """Mean cross entropy, and a penalty on the hidden units of dense feed-forwards that are on.

    A unit is on as far as what its nonlinear function is computed of (the gate of a gated kind)
    exceeds ``off_below``: of ReLU its activation, of GELU and SiLU the pre-activation, clamped.
    The penalty is the mean over tokens and layers.  ``zero_activations`` is logged beside it: the
    share of units that are off, by layer too.
    """

    penalty: str = run_setting(
        "square_hoyer",
        "of the units a of a token: square Hoyer, (sum a)^2 / sum a^2, from 1 for one unit to F "
        "for equal ones; or L1, sum a",
        choices=("square_hoyer", "l1"),
    )
    weight: float = run_setting(1e-3, "coefficient of the penalty; 0 = none, as a control", low=0.0)
    off_below: float = run_setting(
        0.0, "units are off below this; the authors take -10 for some models with GELU", low=-100.0
    )

    def obstacle(self, model):
        """Refuses models without dense feed-forwards, or with some that have no hidden units."""
        dense = [layer.model for layer in model.by_layer if not layer.is_moe]
        if not dense:
            return (
                "penalizes the units of dense feed-forwards, and all layers have experts; train so "
                "before the model is split"
            )
        for layer in dense:
            # The kinds of activations are registered by a room above the settings.
            if layer.feed_forward_kind.hidden is None:
                return (
                    f"needs hidden units, and config.model.activation={layer.activation!r} does "
                    "not say what they are; choose another one"
                )
        return None

    def activation_sums(
        self, activation_BLF: Float[Array, "B L F"], valid_BL: Bool[Array, "B L"]
    ) -> dict[str, Float[Array, "B"]]:
        """Penalties, and shares of units that are off."""
        given_BLF = jnp.where(valid_BL[..., None], activation_BLF.astype(jnp.float32), 0.0)
        unit_BLF = jnp.where(valid_BL[..., None], jax.nn.relu(given_BLF - self.off_below), 0.0)
        sum_BL = jnp.sum(unit_BLF, axis=-1)
        penalty_BL = sum_BL if self.penalty == "l1" else _square_hoyer(sum_BL, unit_BLF)
        off_BL = jnp.mean((unit_BLF == 0).astype(jnp.float32), axis=-1) * valid_BL
        return {"penalty_N": jnp.sum(penalty_BL, axis=-1), "off_N": jnp.sum(off_BL, axis=-1)}

    def value(self, sums):
        """The language model's value plus the weighed penalty, and what both are made of."""
        value, parts = super().value(sums)
        if "penalty_N" not in sums:
            return value, parts
        divisor = jnp.where(sums["weight"] > 0, sums["weight"], 1)
        penalty_N, off_N = sums["penalty_N"] / divisor, sums["off_N"] / divisor
        parts |= {"activation_penalty_N": penalty_N, "zero_activations_N": off_N}
        return value + self.weight * jnp.mean(penalty_N), parts


def _square_hoyer(
    sum_BL: Float[Array, "B L"], unit_BLF: Float[Array, "B L F"]
) -> Float[Array, "B L"]:
    """(sum a)^2 / sum a^2; 0 where all units are off."""
    squares_BL = jnp.sum(jnp.square(unit_BLF), axis=-1)
    some_BL = squares_BL > 0
    return jnp.where(some_BL, jnp.square(sum_BL) / jnp.where(some_BL, squares_BL, 1.0), 0.0)
