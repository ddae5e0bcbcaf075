"""Choice of the transport of expert parallelism: how tokens reach experts on other devices."""

import functools

from dynmoe_jax import config
from dynmoe_jax.experts.parallel.exchange import Exchanged, all_to_all, ragged_all_to_all
from dynmoe_jax.experts.parallel.transport import Transport, ring
from dynmoe_jax.hardware.choice import choose, platform_obstacle
from dynmoe_jax.hardware.target import Target, current_target

SETTING = "config.model.moe.transport"
PLATFORMS = {"ragged_all_to_all": ("gpu", "tpu")}
WORTH_IT = 0.5
"""Share of the ring's bytes from which on an exchange is not used: its small messages, and
slots that are computed from the routing, cost what a ring does not.  Not measured."""


def device_visits(experts_per_token: float, devices: int) -> float:
    """Expected number of other devices that a token visits, if its experts lie anywhere alike.

    A device is missed by all m experts of a token with probability (1 - 1/n)^m.
    """
    return (devices - 1) * (1 - (1 - 1 / devices) ** experts_per_token)


def choose_transport(moe: config.MoE, target: Target, devices: int) -> str:
    """Returns the name of a transport: the one requested, or for ``"auto"``:

    1. ``all_to_all`` if ``tokens_per_pair`` bounds what it sends: no other transport does.
    2. CPU: ``ring``; there is no other collective that sends less.
    3. TPU and GPU: what sends less.  With the ring a token travels to n - 1 devices, with a ragged
       exchange to (n - 1)(1 - (1 - 1/n)^m) of them for m experts per token (docs/measurements.md:
       transport-visits).  ``ragged_all_to_all`` if that is less than half (from n = 4 on),
       otherwise ``ring``.

    Args:
      moe: the settings.
      target: what the program will run on.
      devices: n, along the ``expert`` axis.

    Raises:
      ConfigError: what was asked for does not run on ``target``.
    """
    expected = moe.route.bounds(moe.num_experts).expected
    share = device_visits(expected, devices) / max(1, devices - 1)
    if moe.tokens_per_pair:
        candidates = ("all_to_all",)
    else:
        candidates = ("ragged_all_to_all", "ring") if share < WORTH_IT else ("ring",)
    return choose(
        *(SETTING, moe.transport, candidates),
        lambda name: platform_obstacle(PLATFORMS.get(name, ()), target),
    )


def make_transport(moe: config.MoE, devices: int, target: Target | None = None) -> Transport:
    """Makes the transport that ``config.model.moe.transport`` names.

    Raises:
      ConfigError: it does not run on ``target`` (by default :func:`current_target`).
    """
    return _transport(choose_transport(moe, target or current_target(), devices), moe)


@functools.cache
def _transport(name: str, moe: config.MoE) -> Transport:
    if name == "ring":
        return ring
    exchange = {"all_to_all": all_to_all, "ragged_all_to_all": ragged_all_to_all}[name]
    return Exchanged(exchange, moe.tokens_per_pair)
