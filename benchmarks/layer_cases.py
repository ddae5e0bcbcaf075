"""What `benchmarks.moe_layer` measures: shapes, routings, and the numbers that all peers share.

Axis legend: T tokens, D model width, E experts, F hidden width of an expert, K slots.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shape of one MoE layer: T tokens, width D, E experts of hidden width F."""

    tokens: int
    width: int
    hidden_width: int
    num_experts: int


PRESETS = {
    "cpu": Preset(4096, 512, 1408, 16),
    "paper": Preset(32768, 1024, 2816, 16),
    "fine_grained": Preset(4096, 512, 256, 64),
    "decode": Preset(8, 1024, 2816, 16),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How tokens choose: ``k`` experts each, or top-p at a sharpness with a given mean.

    Attributes:
      name: e.g. ``"top_2"`` or ``"top_p_2"``.
      k: experts per token, 0 for top-p.
      p: threshold of top-p, 0 for top-k.
      scale: factor on the router logits: sharper distributions need fewer experts.
    """

    name: str
    k: int = 0
    p: float = 0.0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Used:
    """What a routing uses: (token, expert) pairs, and experts that some token chose."""

    rows: int
    experts: int


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The same numbers for every peer.  Logits ``x_TD router_DE`` have standard deviation 1."""

    x_TD: Float[np.ndarray, "T D"]
    router_DE: Float[np.ndarray, "D E"]
    gate_up_ED2F: Float[np.ndarray, "E D 2*F"]
    down_EFD: Float[np.ndarray, "E F D"]
    dy_TD: Float[np.ndarray, "T D"]


def draw(preset: Preset) -> Arrays:
    """Draws them from a fixed seed, so that processes need not send them to each other."""
    rng = np.random.default_rng(0)
    T, D, F, E = dataclasses.astuple(preset)

    def normal(shape, fan_in):
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))

    return Arrays(
        normal((T, D), 1), normal((D, E), D), normal((E, D, 2 * F), D), normal((E, F, D), F),
        normal((T, D), 1),
    )  # fmt: skip


def experts_of_top_p(logits_TE: Float[np.ndarray, "T E"], p: float) -> float:
    """Mean experts per token: how many fit until their probabilities pass p."""
    odds_TE = np.exp(logits_TE - logits_TE.max(axis=-1, keepdims=True))
    sorted_TE = -np.sort(-odds_TE / odds_TE.sum(axis=-1, keepdims=True), axis=-1)
    before_TE = np.cumsum(sorted_TE, axis=-1) - sorted_TE
    return float(np.mean(np.sum(before_TE <= p, axis=-1)))


def scale_for(logits_TE: Float[np.ndarray, "T E"], p: float, mean: float) -> float:
    """The factor on the logits at which top-p uses ``mean`` experts per token (bisection)."""
    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        more = experts_of_top_p(middle * logits_TE, p) > mean
        low, high = (middle, high) if more else (low, middle)
    return (low + high) / 2


def choices(preset: Preset, arrays: Arrays, p: float = 0.4) -> dict[str, Choice]:
    """Top-1, 2, 4, 7, and top-p from sharp routers to flat ones, named by the mean they reach."""
    logits_TE = arrays.x_TD @ arrays.router_DE
    found = [Choice(f"top_{k}", k=k) for k in (1, 2, 4, 7) if k <= preset.num_experts]
    for mean in (1.5, 2, 4):
        scale = scale_for(logits_TE, p, mean)
        found.append(Choice(f"top_p_{mean:g}", p=p, scale=scale))
    found.append(Choice("top_p_flat", p=p, scale=0.1))
    return {choice.name: choice for choice in found}
