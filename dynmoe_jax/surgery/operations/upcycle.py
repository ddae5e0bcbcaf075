"""Sparse upcycling: a dense model becomes a mixture of copies, or of slices, of its feed-forwards.

Whole copies: arXiv 2212.05055.  Slices that are chosen together ("virtual groups"): arXiv
2410.07524.  Slices of shuffled copies, partly drawn again: Qwen1.5-MoE.

Axis legend: E experts, G slices of a feed-forward, F hidden width, D model width.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.edits.arrays import has_axis, size_of, take
from dynmoe_jax.edits.roles import disturbed, drawn, redrawn, rescale
from dynmoe_jax.fields import ConfigError, free_setting
from dynmoe_jax.surgery.experts.new_experts import GatedExperts, dense_place
from dynmoe_jax.surgery.experts.routers import is_of_router, new_array
from dynmoe_jax.surgery.operation import OPERATIONS


@OPERATIONS.register("upcycle")
@dataclasses.dataclass(frozen=True)
class Upcycle(GatedExperts):
    """Makes experts of copies or slices of dense feed-forwards, with a new router.

    With gates that sum to one, experts that are equal compute what the feed-forward did, whatever
    the router says.  Slices need a router that gives all slices of a copy the same logit, so that
    copies are chosen whole, and weights that are larger by what the gates take away.
    """

    num_experts: int = free_setting(8, "experts of a layer, slices counted", unit="experts", low=1)
    granularity: int = free_setting(
        1, "slices that each copy of a feed-forward is cut into (G)", low=1
    )
    softmax: str = free_setting(
        "before", "softmax before or after the choice of top-k", choices=("before", "after")
    )
    scale: str = free_setting(
        "down",
        "matrices that make up for what gates take away: down alone, which is exact for any "
        "activation; all, each by a root, as the paper does; none",
        choices=("down", "all", "none"),
    )
    shuffle: bool = free_setting(
        False, "order hidden units anew in every copy before it is cut (Qwen1.5-MoE)"
    )
    reinit: float = free_setting(
        0.0, "share of the entries of every expert that are drawn again", low=0.0, high=1.0
    )
    noise: float = free_setting(
        0.0, "standard deviation of noise on experts, as a share of their own", low=0.0
    )
    exact: ClassVar = "unless shuffled, drawn again or with noise"
    paper: ClassVar = "Sparse Upcycling, 2212.05055; virtual groups, 2410.07524; Qwen1.5-MoE"

    @property
    def grouped(self) -> bool:
        """Whether copies are chosen whole, by equal logits of their slices."""
        return self.granularity > 1 and not self.shuffle

    @property
    def unit_gates(self) -> bool:
        """Whether the gates of a token sum to one."""
        return self.renormalize or (self.softmax == "after" and not self.p)

    def factor(self) -> float:
        """Factor of experts, to make up for gates (s; arXiv 2410.07524).

        Gates of a token that sum to one give each slice of a copy 1/G of what the copy gets; even
        probabilities give each expert 1/E, and k/G copies are chosen.
        """
        if self.scale == "none" or self.shuffle:
            return 1.0
        if self.unit_gates:
            return float(self.granularity)
        return self.num_experts * self.granularity / self.k

    def promise(self, parents):
        """1e-5 where the experts of any token add up to the feed-forward."""
        changed = self.shuffle or self.reinit or self.noise
        even = self.unit_gates or not self.router_std
        exact = self.factor() == 1.0 or self.scale == "down" or self._roots_are_exact(parents[0])
        slices_made_up = self.granularity == 1 or self.scale != "none"
        return 1e-5 if even and exact and slices_made_up and not changed else None

    def _roots_are_exact(self, parent: config.Config) -> bool:
        """Whether a root on each matrix multiplies what experts compute by the factor."""
        layers = self.chosen(parent.model)
        return all(parent.model.by_layer[i].model.feed_forward_kind.homogeneous for i in layers)

    def remarks(self, parents):
        """Says that experts are equal."""
        if self.promise(parents) is None or self.granularity > 1:
            return []
        return [
            "All experts of a layer are equal: until training tells them apart, the router decides "
            "nothing; --noise makes them differ."
        ]

    def result(self, parents):
        """The parent's settings with experts in the chosen layers."""
        (cfg,) = parents
        self.check_dense(cfg.model)
        self._check_slices(cfg.model)
        self._check_gates()
        router = self.chosen_router()
        if not self.p:
            router["top_k.softmax"] = self.softmax
        return self.with_experts(cfg, self.num_experts, self._widths, router)

    def _widths(self, units: int) -> dict[str, int]:
        return {"hidden_width": units // self.granularity}

    def _check_slices(self, model: config.Model) -> None:
        if self.grouped and self.num_experts % self.granularity:
            raise ConfigError(
                f"--granularity={self.granularity} must divide --num_experts={self.num_experts}, "
                "or the last copy is not whole; with --shuffle=true it need not be."
            )
        for i in self.chosen(model):
            width = model.by_layer[i].model.hidden_width
            if width % self.granularity:
                raise ConfigError(
                    f"--granularity={self.granularity} must divide the hidden width {width} of "
                    f"layer {i}."
                )
        if self.grouped and self.k % self.granularity:
            raise ConfigError(
                f"--top_k={self.k} must be a multiple of --granularity={self.granularity}, so that "
                "copies are chosen whole; or cut shuffled ones with --shuffle=true."
            )

    def _check_gates(self) -> None:
        if not self.unit_gates and self.scale == "none":
            raise ConfigError(
                "--renormalize=false --scale=none: gates that do not sum to one make every "
                "feed-forward smaller, and the model worse than its parent; leave --renormalize "
                "true, or scale with --scale=down."
            )
        if self.p and (self.granularity > 1 or not self.renormalize):
            raise ConfigError(
                f"--top_p={self.p:g} needs --renormalize=true and --granularity=1: how many "
                "slices of a copy it takes, and what their gates sum to, differs from token to "
                "token."
            )

    # ── Arrays ──

    def array(self, place, given):
        """Copies what is not of experts; a slice of the dense feed-forward; a new router."""
        if is_of_router(given.model, place):
            return self._router(place, given)
        if place.expert is None:
            return given.read(place)
        values = self._slice(place, given)
        values = rescale(values, self._factor_of(place, given.model), given.role)
        return self._made_different(values, place, given)

    def _router(self, place, given):
        if not (self.grouped and has_axis(place.array_name, "E")):
            return new_array(place, given, self.router_std)
        copies = self.num_experts // self.granularity
        fewer = dataclasses.replace(given, shape=(*given.shape[:-1], copies))
        return np.repeat(new_array(place, fewer, self.router_std), self.granularity, axis=-1)

    def _slice(self, place, given):
        """The units of an expert, of the dense feed-forward."""
        name, values = place.array_name, given.read(dense_place(place))
        if self.granularity == 1 and not self.shuffle:
            return values
        units = size_of(values, name, "F")
        copy, part = divmod(place.expert, self.granularity)
        order = np.arange(units)
        if self.shuffle:
            of_copy = dataclasses.replace(place, name="units", expert=copy)
            order = given.random(of_copy).permutation(units)
        width = units // self.granularity
        return take(values, name, "F", order[part * width : (part + 1) * width])

    def _factor_of(self, place, model: config.Model) -> float:
        """Factor of one matrix."""
        factor = self.factor()
        if self.scale == "all":
            return factor ** (1 / model.by_layer[place.layer].model.moe.expert_kind.degree)
        return factor if place.array_name.startswith("down") else 1.0

    def _made_different(self, values, place, given):
        """With noise, and with entries that are drawn again."""
        if self.noise:
            std = self.noise * float(np.std(values))
            values = disturbed(values, given.normal(place, std, "noise"), given.role)
        if not self.reinit:
            return values
        again = np.zeros(values.size, bool)
        order = given.random(place, "which").permutation(values.size)
        again[order[: round(self.reinit * values.size)]] = True
        new = drawn(given.normal(place, given.model.init_std, "again"), given.role)
        return redrawn(values, new, again.reshape(values.shape), given.role)
