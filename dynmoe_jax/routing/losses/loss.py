"""Interface of routing losses, and their registry.

A routing loss is a function of sums over tokens, which add up: over devices and over microbatches.
So it is that of the whole batch, however the batch is cut: an expert that is busy on one device and
idle on all others is not overloaded.

Axis legend: T tokens, E experts; * axes in front (layers).
"""

import abc
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.fields import AUTO, free_setting
from dynmoe_jax.registry import CONTROLLERS, choice
from dynmoe_jax.routing.router import Params, Router, RouterInput

weight_setting = partial(free_setting, AUTO, low=0.0, auto=True)
"""Declares the coefficient of a loss; auto: what the router declares."""


def controller_setting(default: str = "") -> Any:
    """Declares the controller of a loss."""
    return choice(
        CONTROLLERS,
        default,
        "who sets the coefficient while training; empty = it stays the weight",
        optional=True,
        defines_model=False,
        fixed_in_run=True,
    )


class RoutingLoss(abc.ABC):
    """A routing loss: a frozen dataclass whose fields are its settings, ``weight`` the first.

    Attributes:
      weight: coefficient; AUTO: what the router declares in ``losses``.
      controller: who moves it, see :func:`controller_setting`.
      label: name beside the axis of its picture; empty: that of the registry.
      needs: facts that the router has to give, see :attr:`dynmoe_jax.routing.router.Router.gives`,
        and names of parameters of router and experts, or ``"outputs"`` of these.  A loss that
        needs those of experts is computed once, with all tokens, and ``given.layer_key`` if it
        reads ``"noise"``.
      reads: fields of :class:`~dynmoe_jax.routing.router.RouterInput` that it needs beyond those
        which the router reads, likewise.
      additive: whether the loss of a batch is the mean of those of its microbatches, weighted by
        tokens.  If not, the gradient sees the sums of the whole batch first.
      by_microbatch: whether the settings (``over="microbatch"``) ask for the loss of each
        microbatch alone, though it is not additive by itself.
    """

    weight: float
    controller = ""
    label: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    additive: ClassVar[bool] = True
    by_microbatch: ClassVar[bool] = False

    def obstacle(self, num_experts: int, width: int) -> str | None:
        """Says why the settings do not fit a layer with so many experts: "NAME=VALUE must …"."""
        return None

    @abc.abstractmethod
    def sums(self, routing: Any, given: RouterInput, params: Params) -> Mapping[str, Array]:
        """Sums over the valid tokens of one layer; padding counts nowhere.

        A loss of parameters alone returns itself times the number of valid tokens.
        """

    @abc.abstractmethod
    def value(self, sums: Mapping[str, Array], tokens: Float[Array, ""]) -> Float[Array, "*"]:
        """The loss of each layer.

        Args:
          sums: of all tokens; axes in front of their own are layers.
          tokens: valid ones, at least 1.
        """


def over_tokens(value_TX: Float[Array, "T X"], valid_T: Bool[Array, "T"]) -> Float[Array, "X"]:
    """The sum over the valid tokens."""
    # where, not a product: a padding token may hold NaN.
    return jnp.sum(jnp.where(valid_T[:, None], value_TX, 0.0), axis=-2)


def times_tokens(loss: Float[Array, ""], given: RouterInput) -> Float[Array, ""]:
    """A loss of parameters alone, times the valid tokens that it stands for."""
    return loss * jnp.sum(given.valid_T, dtype=jnp.float32)


def coefficients(
    losses: Mapping[str, RoutingLoss], routers: Sequence[Router]
) -> dict[str, tuple[float, ...]]:
    """Coefficients by layer of the losses that are computed, by name.

    Computed are those that are weighed, those that a router declares (0: logged alone), and those
    whose controller the settings name.  Left at auto, a layer has what its own router declares.

    Args:
      losses: all of them.
      routers: of the MoE layers, in order.
    """
    found = {}
    for name, loss in losses.items():
        weights = [loss.weight] * len(routers)
        if loss.weight == AUTO:
            weights = [router.losses.get(name, 0.0) for router in routers]
        declared = any(name in router.losses for router in routers)
        if routers and (any(weights) or declared or _names_controller(loss)):
            found[name] = tuple(weights)
    return found


def moves(loss: RoutingLoss, weights: Sequence[float]) -> bool:
    """Whether a loss changes gradients: it is weighed, or its controller may weigh it."""
    return any(weights) or _names_controller(loss)


def _names_controller(loss: RoutingLoss) -> bool:
    """Whether the settings name a controller that the loss does not have by itself."""
    return bool(loss.controller) and loss.controller != type(loss).controller
