"""Bases of operations that make experts of dense feed-forwards, with a new router.

Axis legend: E experts, F hidden width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.edits.places import Place, stored_in
from dynmoe_jax.edits.settings import LayerPlan, plans_of, with_layers
from dynmoe_jax.experts.kinds.kind import without_experts
from dynmoe_jax.fields import ConfigError, free_setting
from dynmoe_jax.surgery.layer_numbers import layers_from
from dynmoe_jax.surgery.operation import Operation


@dataclasses.dataclass(frozen=True)
class NewExperts(Operation):
    """Settings that all such operations share."""

    layers: str = free_setting("", "layers that get experts, such as 2,5-7; empty = all")
    router_std: float = free_setting(
        0.02, "standard deviation of the new router's entries", low=0.0
    )

    def chosen(self, model: config.Model) -> tuple[int, ...]:
        """Numbers of the layers that get experts."""
        return layers_from(self.layers, model.num_layers)

    def check_dense(self, model: config.Model) -> None:
        """Raises ConfigError for a model that has experts, or feed-forwards that they cannot be
        made of."""
        if model.moe_layers:
            numbers = ", ".join(map(str, model.moe_layers))
            raise ConfigError(
                f"--from names a model that has experts in layers {numbers} already; give a dense "
                "one, whose feed-forwards become experts."
            )
        if lost := _not_of_experts(model, self.chosen(model)):
            raise ConfigError(
                f"--from names a model with config.model.linear={model.linear!r}, and experts have "
                f"no {', '.join(lost)}; give one whose feed-forwards are dense matrices."
            )

    def with_experts(
        self,
        cfg: config.Config,
        num_experts: int,
        widths: Callable[[int], Mapping[str, int]],
        router: Mapping[str, Any],
    ) -> config.Config:
        """Settings with experts in the chosen layers.

        Args:
          cfg: of the dense model, in which settings of experts had no effect.
          num_experts: E of each such layer.
          widths: (F of a dense layer) -> settings of widths below ``config.model.moe``.
          router: more settings there.
        """
        chosen, plans = self.chosen(cfg.model), []
        for i, plan in enumerate(plans_of(cfg.model)):
            own = dict(plan.own)
            if i in chosen:
                if "hidden_width" in own:
                    own |= _below_moe(widths(own.pop("hidden_width")))
                if KIND in own:
                    own[EXPERTS] = own.pop(KIND)
            plans.append(LayerPlan(i in chosen, own))
        changes = {"num_experts": num_experts, **widths(cfg.model.hidden_width), **router}
        changes = _below_moe(_defaults(cfg.model.moe) | changes)
        return with_layers(cfg, plans, changes | {EXPERTS: getattr(cfg.model, KIND)})


@dataclasses.dataclass(frozen=True)
class GatedExperts(NewExperts):
    """Settings of those whose router weighs experts by gates."""

    top_k: int = free_setting(
        0,
        "experts that a token uses, by top-k; 0 = 2, unless top_p is given",
        unit="experts",
        low=0,
    )
    top_p: float = free_setting(
        0.0,
        "cumulative probability that the experts of a token pass (p), by top-p; 0 = top-k",
        low=0.0,
        high=1.0,
    )
    experts_per_token: float = free_setting(
        0.0,
        "mean experts of a token, which p is moved to on training text; 0 = p as it is given",
        unit="experts",
        low=0.0,
    )
    renormalize: bool = free_setting(
        True, "gates of a token sum to one; otherwise they are probabilities"
    )

    @property
    def p(self) -> float:
        """Threshold of top-p to begin with; 0 where it is top-k."""
        return self.top_p or (0.4 if self.experts_per_token else 0.0)

    @property
    def k(self) -> int:
        """Experts of a token by top-k; 0 where it is top-p."""
        return 0 if self.p else self.top_k or 2

    @property
    def wanted_experts(self) -> float:
        """Mean experts of a token that p is moved to; 0: it stays."""
        return self.experts_per_token

    def check_dense(self, model):
        """Raises ConfigError for two routers, too."""
        super().check_dense(model)
        if self.top_k and (self.top_p or self.experts_per_token):
            other = (
                f"top_p={self.top_p:g}"
                if self.top_p
                else (f"experts_per_token={self.experts_per_token:g}")
            )
            raise ConfigError(f"--top_k={self.top_k} --{other} name two routers; give one of them.")

    def with_experts(self, cfg, num_experts, widths, router):
        """Settings with experts in the chosen layers, of which a token can use so many.

        Raises:
          ConfigError: a token is to use more experts than there are, or less than one.
        """
        if self.experts_per_token and not 1 <= self.experts_per_token <= num_experts:
            raise ConfigError(
                f"--experts_per_token={self.experts_per_token:g} must be from 1 to the "
                f"{num_experts} experts of a layer."
            )
        return super().with_experts(cfg, num_experts, widths, router)

    def chosen_router(self) -> dict[str, Any]:
        """Settings of the router below ``config.model.moe``."""
        if self.p:
            router = {"router": "top_p", "top_p.threshold": self.p}
        else:
            router = {"router": "top_k", "top_k.k": self.k}
        router[f"{router['router']}.renormalize"] = self.renormalize
        return router


KIND, EXPERTS = "activation", "moe.experts"
"""Settings that name what a dense feed-forward computes, and what an expert does."""


def _not_of_experts(model: config.Model, layers: Sequence[int]) -> list[str]:
    """Names of the arrays of dense feed-forwards that have no place in experts: what a kind of
    linear map adds to matrices, or has in place of them."""
    found: set[str] = set()
    for i in layers:
        own = model.by_layer[i].model
        declared = own.feed_forward_kind.parameters(own.width, 1, own.hidden_width)
        known = {f"feed_forward.{without_experts(name)}" for name in declared}
        names = {stored.name for stored, _ in stored_in(model) if i in stored.layers}
        found |= known ^ {name for name in names if name.startswith("feed_forward.")}
    return sorted(found)


_WHICH_LAYERS = ("every_n_layers", "layer_offset", "dense_first_layers")


def _defaults(moe: config.MoE) -> dict[str, Any]:
    """Settings of experts as a new model begins with, but for which layers have any."""
    new = config.to_dict(type(moe)())
    return {name: value for name, value in new.items() if name not in _WHICH_LAYERS}


def _below_moe(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"moe.{name}": value for name, value in settings.items()}


def dense_place(place: Place) -> Place:
    """The place of the dense feed-forward's array that an expert's is made of."""
    return dataclasses.replace(place, name=f"feed_forward.{place.array_name}", expert=None)
