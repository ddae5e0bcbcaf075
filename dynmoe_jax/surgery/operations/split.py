"""Splitting: the hidden units of a dense feed-forward are divided among experts.

MoEfication (arXiv 2110.01786), FactorLLM (arXiv 2408.11855), LLaMA-MoE (arXiv 2406.16554).

Axis legend: E experts, F hidden units of the feed-forward.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.calibration.pricing import SAMPLES
from dynmoe_jax.edits.arrays import size_of, take
from dynmoe_jax.edits.places import Place
from dynmoe_jax.experts.kinds.kind import ExpertKind, without_experts
from dynmoe_jax.experts.kinds.swiglu import SwiGLU
from dynmoe_jax.fields import AUTO, ConfigError, free_setting
from dynmoe_jax.surgery.experts.controls import BY_DIVISION, Division, lost_by_division
from dynmoe_jax.surgery.experts.new_experts import NewExperts
from dynmoe_jax.surgery.experts.routers import is_of_router, layer_of, new_array
from dynmoe_jax.surgery.experts.unit_rows import WHICH, input_matrix
from dynmoe_jax.surgery.operation import OPERATIONS, Wanted
from dynmoe_jax.surgery.partitions import PARTITIONS, Partition, Units
from dynmoe_jax.surgery.partitions.importance import (
    assigned,
    importance,
    most_important,
    shared_by_most,
)

_INPUTS = "ffn_input_samples"


@OPERATIONS.register("split")
@dataclasses.dataclass(frozen=True)
class Split(NewExperts):
    """Divides the hidden units of dense feed-forwards among experts of one size.

    All experts together, each with weight 1, compute what the feed-forward did; so does the result
    unless --top_k says that a token uses fewer.  Nothing but the order of units changes.

    Of fewer, weights are 1 (--gates=ones, straight through: the router learns by the gradient of
    its probabilities), or a softmax over those chosen (--gates=softmax, LLaMA-MoE).  The output of
    the k that are chosen of E is multiplied by E / k where experts are alike in size
    (contiguous, random, importance: FactorLLM, LLaMA-MoE), and by 1 where those left out are to be
    those that give little (clusters, coactivation: MoEfication).  Gates of a softmax sum to one, so
    that with LLaMA-MoE's factor E / k the output is about 1 / k of the feed-forward's, and 1 / E
    of it with all experts on; --scale=E makes up for it.
    """

    num_experts: int = free_setting(8, "experts of a layer", unit="experts", low=1)
    by: str = free_setting("contiguous", "how units are divided", choices=PARTITIONS)
    on: str = free_setting(
        "auto",
        "matrix that clusters are found in, of gated kinds; auto = the gate, which says what is on",
        choices=WHICH,
        only_with={"by": ("clusters",)},
    )
    share: str = free_setting(
        "none",
        "units that several experts share: none; inner: each expert has the units that are most "
        "important for its text, whoever has them besides; inter: those that most experts would "
        "choose are a shared expert that every token uses, and the others are divided",
        choices=("none", "inner", "inter"),
        only_with={"by": ("importance",)},
    )
    shared_width: int = free_setting(
        0,
        "units of the shared expert; 0 = about as many as an expert has",
        unit="units",
        low=0,
        only_with={"share": ("inter",)},
    )
    top_k: int = free_setting(
        0, "experts that a token uses; 0 = all, which is exact", unit="experts", low=0
    )
    gates: str = free_setting(
        "ones",
        "weights of the chosen experts: 1, or the softmax over their logits",
        choices=("ones", "softmax"),
    )
    scale: float = free_setting(
        AUTO,
        "the experts' output is multiplied by this; auto = experts / top_k, but 1 by clusters and "
        "coactivation",
        above=0.0,
        auto=True,
    )
    controls: bool = free_setting(
        True,
        "with fewer experts than all, say what is lost with the best ones of each token, beside "
        "experts of random units and of units by size",
    )
    exact: ClassVar = "with all experts on and weights of 1"
    statistics: ClassVar = frozenset({_INPUTS}).union(
        *(each.statistics for each in PARTITIONS.values())
    )
    choices: ClassVar = BY_DIVISION
    found: ClassVar = (
        "Squared error of the layer's output with the best experts of each token alone, as a share "
        "of the whole output's square, and after the factor that makes it least: with these "
        "experts, with experts of random units, and with experts of units in the order of their "
        "size. A router can only come near it."
    )
    paper: ClassVar = "MoEfication, 2110.01786; FactorLLM, 2408.11855; LLaMA-MoE, 2406.16554"

    @property
    def k(self) -> int:
        """Experts of a token."""
        return self.top_k or self.num_experts

    @property
    def factor(self) -> float:
        """Factor of the experts' output."""
        if self.scale != AUTO:
            return self.scale
        return self.num_experts / self.k if self.partition.makes_up else 1.0

    @property
    def _has_controls(self) -> bool:
        return self.controls and self.k < self.num_experts

    @property
    def partition(self) -> Partition:
        """The way in which units are divided."""
        return PARTITIONS[self.by]()

    def wanted(self, parents):
        """Statistics that the partition needs, of the layers that are split."""
        names, layers = self.partition.statistics, self.chosen(parents[0].model)
        names |= {_INPUTS} if self._has_controls else frozenset()
        clusters = self.num_experts if self.partition.of_clusters else 1
        return Wanted(names, layers, clusters) if names else Wanted()

    def promise(self, parents):
        """1e-5 where all units are there once, with weights of 1."""
        whole = self.k == self.num_experts and self.share != "inner"
        return 1e-5 if whole and self.gates == "ones" and self.factor == 1.0 else None

    def remarks(self, parents):
        """Says what is left to do, and what softmax gates do to the output."""
        said = []
        if self.k < self.num_experts:
            said.append("The router knows nothing yet: fit it with fit_router, or train the model.")
        if self.gates == "softmax" and self.factor != self.num_experts:
            share = self.factor / self.num_experts
            said.append(
                f"Gates sum to one and --scale is {self.factor:g}, so the experts give about "
                f"{share:.2g} of what the feed-forward gave; --scale={self.num_experts} makes up "
                "for it."
            )
        return said

    def result(self, parents):
        """The parent's settings with experts in the chosen layers."""
        (cfg,) = parents
        self.check_dense(cfg.model)
        self.partition.check()
        self._check_units(cfg.model)
        if self.k > self.num_experts:
            raise ConfigError(
                f"--top_k={self.top_k} is more than --num_experts={self.num_experts}; a token "
                "uses each at most once."
            )
        ones = self.gates == "ones"
        weights = {"straight_through": ones, "renormalize": not ones}
        router = {"router": "top_k", "top_k.k": self.k, "routed_scale": self.factor}
        router |= {f"top_k.{name}": value for name, value in weights.items()}
        return self.with_experts(cfg, self.num_experts, self._widths, router)

    def _widths(self, units: int) -> dict[str, int]:
        """Widths of an expert and of the shared one; all units of a feed-forward are in them."""
        shared = 0
        if self.share == "inter":
            each = units // (self.num_experts + 1)
            shared = self.shared_width or units - each * self.num_experts
        hidden = (units - shared) // self.num_experts
        return {"hidden_width": hidden, "shared_hidden_width": shared}

    def _check_units(self, model: config.Model) -> None:
        for i in self.chosen(model):
            layer = model.by_layer[i].model
            if not layer.feed_forward_kind.splits_hidden:
                raise ConfigError(
                    f"config.model.activation={layer.activation} of layer {i} is no sum over "
                    "hidden units, so it cannot be split; upcycle copies it."
                )
            input_matrix(layer.feed_forward_kind, self.on)
            if self.share == "inter" and not isinstance(layer.feed_forward_kind, SwiGLU):
                raise ConfigError(
                    f"--share=inter makes a shared expert, which is a SwiGLU, and layer {i} has "
                    f"config.model.activation={layer.activation}; take --share=inner."
                )
            width, (hidden, shared) = layer.hidden_width, self._widths(layer.hidden_width).values()
            if hidden < 1 or hidden * self.num_experts + shared != width:
                less = f" less --shared_width={shared}" if shared else ""
                raise ConfigError(
                    f"--num_experts={self.num_experts} must divide the hidden width {width}{less} "
                    f"of layer {i}."
                )

    # ── Arrays ──

    def array(self, place, given):
        """Copies what is not of experts; the units of an expert; a new router."""
        if is_of_router(given.model, place):
            return new_array(place, given, self.router_std)
        name = place.array_name.removeprefix("shared_")
        if place.expert is None and name == place.array_name:
            return given.read(place)
        values = given.read(Place(place.layer, f"feed_forward.{name}"))
        division = given.once(
            ("units", place.layer), lambda: self._divided(place, size_of(values, name, "F"), given)
        )
        units = division.shared if place.expert is None else division.experts[place.expert]
        return take(values, name, "F", units)

    def _divided(self, place, count: int, given) -> Division:
        """Units of every expert of a layer, with what is found out of them among the findings."""
        kind = layer_of(given.model, place).moe.expert_kind
        units = Units(place.layer, count, given.parameters(), input_matrix(kind, self.on))
        division = self._division(units)
        found = _counts(division.experts) if self.share == "inner" else {}
        if self._has_controls:
            found |= self._lost(kind, units, division)
        if found:
            given.findings[place.layer] = found
        return division

    def _division(self, units: Units) -> Division:
        """Units of every expert, all rising."""
        nothing = np.arange(0)
        if self.share == "none":
            return Division(_by_expert(self.partition(units, self.num_experts)), nothing)
        count, width = units.count, self._widths(units.count)["hidden_width"]
        importance_EF = importance(units)
        if self.share == "inner":
            return Division(most_important(importance_EF, width), nothing)
        shared = shared_by_most(importance_EF, width, count - width * self.num_experts)
        rest = np.setdiff1d(np.arange(count), shared)
        experts = _by_expert(assigned(importance_EF[:, rest]))
        return Division([rest[own] for own in experts], shared)

    def _lost(self, kind: ExpertKind, units: Units, division: Division) -> dict[str, float]:
        """Error with fewer experts than all, beside controls."""
        given, place = units.given, Place(units.layer, "feed_forward")
        weights = {
            name: given.read(Place(units.layer, f"feed_forward.{without_experts(name)}"))
            for name in kind.parameters(1, 1, 1)
        }
        input_SD = np.asarray(given.statistic(_INPUTS, units.layer), np.float32)
        every = -(-len(input_SD) // SAMPLES)  # of several clusters of text there are more
        random = given.random(place, "controls")
        return lost_by_division(kind, weights, input_SD[::every], division, self.k, random)


def _by_expert(expert_F: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(expert_F == e) for e in range(expert_F.max() + 1)]


def _counts(experts: list[np.ndarray]) -> dict[str, float]:
    """Numbers of different units in experts, and of those in several."""
    _, often = np.unique(np.concatenate(experts), return_counts=True)
    return {"different units": len(often), "in several experts": int((often > 1).sum())}
