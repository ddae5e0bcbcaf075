"""Routers of a split model that foretell how long each expert's output is.

D2DMoE (arXiv 2310.04361).

Axis legend: S sampled tokens, E experts.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.fields import ConfigError, free_setting, same_setting
from dynmoe_jax.registry import with_choice
from dynmoe_jax.routing.routers.threshold import Threshold
from dynmoe_jax.surgery.experts.fitted_routers import FittedRouters
from dynmoe_jax.surgery.experts.norm_fit import first_router, fitted_to_norms, r_squared, scores_of
from dynmoe_jax.surgery.experts.router_fit import Pairs, largest, pairs_of
from dynmoe_jax.surgery.experts.split_models import (
    INPUTS,
    check_split,
    expert_arrays,
    kept_and_learned,
    order_of_steps,
)
from dynmoe_jax.surgery.operation import OPERATIONS, Given


@OPERATIONS.register("fit_norms")
@dataclasses.dataclass(frozen=True)
class FitNorms(FittedRouters):
    """Fits routers that foretell the norms of experts' outputs, by which tokens choose how many.

    A net of two layers learns, by squared errors, how long the output of each expert of a split
    model is, from inputs of the feed-forwards while all experts are on, that is of the dense model.
    Experts of which it expects little are left out (the router ``threshold``); how little is
    --tau, which evaluation and generation may change: --config.model.moe.threshold.tau=0.2.
    """

    tau: float = same_setting(Threshold, "tau")
    rule: str = same_setting(Threshold, "rule")
    sense: str = same_setting(Threshold, "sense")
    k: int = same_setting(Threshold, "k")
    hidden_width: int = same_setting(Threshold, "hidden_width")
    learning_rate: float = free_setting(3e-3, "of Adam, at first", above=0.0)
    paper: ClassVar = "D2DMoE, 2310.04361"
    choices: ClassVar = ("fitted", "oracle", "as many for each token", "chance")
    found: ClassVar = (
        "Of samples that nothing was learned from: R^2 of the foretold norms, around the mean of "
        "each expert; experts per token, and their standard deviation over tokens; and the squared "
        "error of the layer's output with the chosen experts alone, as a share of the whole "
        "output's square: chosen by the fitted router, by an oracle that knows the norms, by the "
        "fitted router as many for each token (their mean, rounded up), and by chance, as many as "
        "the fitted router takes."
    )

    def result(self, parents):
        """The parent's settings with the threshold router."""
        (cfg,) = parents
        check_split(cfg.model, with_threshold=True)
        if self.rule == "fixed" and self.k > cfg.model.moe.num_experts:
            raise ConfigError(
                f"--k={self.k} is more than the {cfg.model.moe.num_experts} experts of a layer; a "
                "token uses each at most once."
            )
        moe = with_choice(cfg.model.moe, "router", ["threshold"])
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
        changes = {"routed_scale": 1.0}
        for name in (field.name for field in dataclasses.fields(Threshold)):
            changes[f"threshold.{name}"] = getattr(self, name)
        return edited(cfg, {f"model.moe.{name}": value for name, value in changes.items()})

    def fitted_router(self, layer: int, given: Given) -> dict[str, np.ndarray]:
        """Parameters of the router of a layer, with what it is worth among the findings."""
        moe = given.model.by_layer[layer].model.moe
        pairs = pairs_of(
            moe.expert_kind, expert_arrays(layer, given), given.statistic(INPUTS, layer)
        )
        random = given.random(Place(layer, "feed_forward"), "norms")
        kept, learned = map(pairs.at, kept_and_learned(len(pairs.input_SD), random))
        norm_SE = learned.norm_SE
        first = first_router(pairs.input_SD.shape[1], self.hidden_width, norm_SE, random)
        order_PB = order_of_steps(len(norm_SE), self.batch_size, self.epochs, random)
        params = fitted_to_norms(
            moe.route, first, learned.input_SD, norm_SE, order_PB, self.learning_rate
        )
        given.findings[layer] = _worth(
            moe.route, scores_of(moe.route, params, kept.input_SD), kept, random
        )
        return params


def _worth(
    route: Threshold, score_SE: np.ndarray, kept: Pairs, random: np.random.Generator
) -> dict[str, float]:
    """Findings of a layer, see :attr:`FitNorms.found`."""
    chosen_SE, best_SE = _chosen(route, score_SE), _chosen(route, kept.norm_SE)
    count_S = chosen_SE.sum(axis=1)
    choices = {
        "fitted": chosen_SE,
        "oracle": best_SE,
        "as many for each token": largest(score_SE, int(np.ceil(count_S.mean()))),
        "chance": random.permuted(chosen_SE, axis=1),
    }
    return {
        "R^2": r_squared(score_SE, kept.norm_SE),
        "experts": float(count_S.mean()),
        "deviation": float(count_S.std()),
        **{name: kept.error(each_SE, 1.0) for name, each_SE in choices.items()},
    }


def _chosen(route: Threshold, score_SE: np.ndarray) -> np.ndarray:
    """Whether a token of these scores uses an expert, by the router's own rule."""
    routing = route.on_logits(jnp.asarray(score_SE), jnp.ones(len(score_SE), bool))
    return np.asarray(routing.chosen_TE)
