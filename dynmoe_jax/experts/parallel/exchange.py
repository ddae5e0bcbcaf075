"""Transport by exchange: a token visits only the devices that have experts of its choice.

A device sends each token at most once to another device, with the token's slots there, whatever
their number, and gets the sum of what those experts contribute.

Axis legend: T tokens of this device, S = n C tokens that arrive, n devices, C tokens that one
device may send to another, K slots per token, k slots among the experts of one device, D model
width, X any width.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.experts.parallel.transport import ARRIVED
from dynmoe_jax.experts.permute import take
from dynmoe_jax.experts.rows import Slots
from dynmoe_jax.mesh.axes import EXPERT

Exchange = Callable[
    [Float[Array, "n C X"], Int[Array, "n"], Int[Array, "n"]], Float[Array, "n C X"]
]
"""(what goes to each device, how many of the C are sent, how many come) -> what came; zeros, or
what the sender had there, beyond those that came."""


def all_to_all(x_nCX, sent_n, received_n):
    """Everything travels, unused slots as well: (n - 1) C X values."""
    del sent_n, received_n
    return jax.lax.all_to_all(x_nCX, EXPERT, split_axis=0, concat_axis=0, tiled=True)


@jax.custom_vjp
def ragged_all_to_all(x_nCX, sent_n, received_n):
    """Only the used slots travel.  TPU and GPU have it, CPU has not."""
    devices, capacity = x_nCX.shape[:2]
    flat_SX = x_nCX.reshape(devices * capacity, -1)
    starts_n = jnp.arange(devices, dtype=jnp.int32) * capacity
    # The same slots on every receiver: the chunk of this device.
    mine_n = jnp.full(devices, jax.lax.axis_index(EXPERT) * capacity, jnp.int32)
    came_SX = jax.lax.ragged_all_to_all(
        flat_SX, jnp.zeros_like(flat_SX), starts_n, sent_n, mine_n, received_n, axis_name=EXPERT
    )
    return came_SX.reshape(x_nCX.shape)


def _ragged_forward(x_nCX, sent_n, received_n):
    return ragged_all_to_all(x_nCX, sent_n, received_n), (sent_n, received_n)


def _ragged_backward(counts, dx_nCX):
    sent_n, received_n = counts
    return ragged_all_to_all(dx_nCX, received_n, sent_n), None, None


ragged_all_to_all.defvjp(_ragged_forward, _ragged_backward)


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """The transport around an exchange.

    Attributes:
      exchange: the collective.
      tokens_per_pair: C / T; 0 means C = T, with which nothing is ever dropped.  Where more than C
        tokens go from one device to another, the last ones lose their experts there; these rows
        are counted.
    """

    exchange: Exchange
    tokens_per_pair: float = 0.0

    def __call__(self, x_TD, slots, compute):
        """See :class:`~dynmoe_jax.experts.parallel.transport.Transport`."""
        tokens, devices = x_TD.shape[0], jax.lax.axis_size(EXPERT)
        count = slots.num_experts // devices
        there = jax.vmap(lambda n: slots.among(n * count, count))(jnp.arange(devices))
        going_nT = jnp.any(there.used_TK, axis=-1)
        queue = partial(_queue, bound=capacity_per_pair(tokens, self.tokens_per_pair))
        token_nC, slot_nT, sent_n = jax.vmap(queue)(going_nT)
        lost_nT1 = (going_nT & (slot_nT == token_nC.shape[1]))[..., None]
        dropped = jnp.sum(lost_nT1 & there.used_TK, dtype=jnp.int32)
        received_n = jax.lax.all_to_all(sent_n, EXPERT, split_axis=0, concat_axis=0, tiled=True)

        def send(x_nTX, x_axis=0):
            taken_nCX = jax.vmap(take, (x_axis, 0, 0))(x_nTX, token_nC, slot_nT)
            came_nCX = checkpoint_name(self.exchange(taken_nCX, sent_n, received_n), ARRIVED)
            return came_nCX.reshape(-1, came_nCX.shape[-1])

        # One up, so that a slot that nothing came to says "no expert".
        expert_Sk = send(jnp.where(there.used_TK, there.expert_TK + 1, 0)) - 1
        expert_Sk = jnp.where(expert_Sk < 0, count, expert_Sk)
        arrived = Slots(expert_Sk, send(there.weight_TK), count)
        y_SD, more = compute(send(x_TD, None), arrived)
        y_nCD = self.exchange(y_SD.reshape(devices, -1, y_SD.shape[-1]), received_n, sent_n)
        y_TD = jnp.sum(jax.vmap(take)(y_nCD, slot_nT, token_nC), axis=0)
        return y_TD, dropped + more


def capacity_per_pair(tokens: int, tokens_per_pair: float) -> int:
    """C: as many as there are tokens, or a share of them (0 = no bound)."""
    return min(tokens, math.ceil(tokens * tokens_per_pair)) if tokens_per_pair else tokens


def _queue(
    going_T: Bool[Array, "T"], bound: int
) -> tuple[Int[Array, "C"], Int[Array, "T"], Int[Array, ""]]:
    """Slots for the tokens that go: (token of each slot, slot of each token, how many).

    T for a slot without a token, C for a token without a slot.
    """
    tokens = going_T.shape[0]
    slot_T = jnp.cumsum(going_T, dtype=jnp.int32) - 1
    slot_T = jnp.where(going_T & (slot_T < bound), slot_T, bound)
    token_C = jnp.full(bound, tokens, jnp.int32)
    token_C = token_C.at[slot_T].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
    return token_C, slot_T, jnp.minimum(jnp.sum(going_T, dtype=jnp.int32), bound)
