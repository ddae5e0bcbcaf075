"""Routers of a split model, fitted to what its experts give.

MoEfication (arXiv 2110.01786), FactorLLM (arXiv 2408.11855).

Axis legend: S sampled tokens, E experts, D model width, P steps, B tokens of a step.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.fields import AUTO, ConfigError, free_setting
from dynmoe_jax.surgery.experts.fitted_routers import FittedRouters
from dynmoe_jax.surgery.experts.router_fit import (
    METHODS,
    Pairs,
    fitted,
    largest,
    logits_of,
    pairs_of,
)
from dynmoe_jax.surgery.experts.split_models import (
    INPUTS,
    check_split,
    expert_arrays,
    kept_and_learned,
    order_of_steps,
)
from dynmoe_jax.surgery.experts.unit_rows import input_matrix
from dynmoe_jax.surgery.operation import OPERATIONS, Given


@OPERATIONS.register("fit_router")
@dataclasses.dataclass(frozen=True)
class FitRouter(FittedRouters):
    """Fits the routers of a split model, and says how many experts a token uses from now on.

    They learn from inputs of the feed-forwards while all experts are on, that is of the dense
    model.  By scores (MoEfication), a net of two layers learns the share that each expert's hidden
    units have; it begins with the means of the experts' rows, and with the identity.  By labels
    (FactorLLM), one matrix learns which k experts alone come nearest to their share of the output.

    Of every layer, the squared error of its output with the chosen experts alone is reported, as a
    share of the whole output's square: with those that an oracle chooses, the fitted router, the
    means of rows that it began with, and chance.
    """

    by: str = free_setting(
        "scores", "what routers learn: scores of experts, or labels of the nearest", choices=METHODS
    )
    top_k: int = free_setting(
        0, "experts that a token uses; 0 = as many as now", unit="experts", low=0
    )
    scale: float = free_setting(
        AUTO,
        "the experts' output is multiplied by this; auto = 1 by scores, experts / top_k by labels",
        above=0.0,
        auto=True,
    )
    net: str = free_setting(
        "auto",
        "router of one matrix, or of two with a tanh between them; auto = tanh by scores, linear "
        "by labels",
        choices=("auto", "linear", "tanh"),
    )
    learning_rate: float = free_setting(1e-2, "of Adam", above=0.0)
    paper: ClassVar = "MoEfication, 2110.01786; FactorLLM, 2408.11855"
    choices: ClassVar = ("fitted", "oracle", "means of rows", "chance")
    found: ClassVar = (
        "Squared error of the layer's output with the chosen experts alone, as a share of the "
        "whole output's square, on samples that nothing was learned from: chosen by the fitted "
        "router, by an oracle that knows what was to be learned, by the means of rows that the "
        "router began with, and by chance."
    )

    def result(self, parents):
        """The parent's settings with another net and k."""
        (cfg,) = parents
        check_split(cfg.model)
        moe = cfg.model.moe
        k = self.top_k or moe.route.k
        if k > moe.num_experts:
            raise ConfigError(
                f"--top_k={k} is more than the {moe.num_experts} experts of a layer; a token uses "
                "each at most once."
            )
        scale = self.scale
        if scale == AUTO:
            scale = moe.num_experts / k if self.by == "labels" else 1.0
        changes = {"moe.top_k.k": k, "moe.top_k.net": self._net, "moe.routed_scale": scale}
        return edited(cfg, {f"model.{name}": value for name, value in changes.items()})

    @property
    def _net(self) -> str:
        if self.net != "auto":
            return self.net
        return "tanh" if self.by == "scores" else "linear"

    def fitted_router(self, layer: int, given: Given) -> dict[str, np.ndarray]:
        """Parameters of the router of a layer, with its errors among the findings."""
        moe = given.model.by_layer[layer].model.moe
        weights = expert_arrays(layer, given)
        pairs = pairs_of(moe.expert_kind, weights, given.statistic(INPUTS, layer))
        random = given.random(Place(layer, "feed_forward"), "pairs")
        kept, learned = kept_and_learned(len(pairs.input_SD), random)
        first = _centroids(moe, weights)
        params = self._descended(moe, first, pairs.at(learned), random)
        given.findings[layer] = self._errors(moe, first, params, pairs.at(kept), given, layer)
        return params

    def _descended(self, moe, first, pairs: Pairs, random) -> dict[str, np.ndarray]:
        order_PB = order_of_steps(len(pairs.input_SD), self.batch_size, self.epochs, random)
        k = moe.route.k
        return fitted(moe.route, first, pairs, self.by, k, order_PB, self.learning_rate)

    def _errors(self, moe, first, params, pairs: Pairs, given: Given, layer: int):
        """Errors of the output by who chooses."""
        k, shape = moe.route.k, pairs.score_SE.shape
        random = given.random(Place(layer, "feed_forward"), "chance")
        chosen = {
            "oracle": pairs.best(self.by, k),
            "fitted": largest(logits_of(moe.route, params, pairs.input_SD), k),
            "means of rows": largest(logits_of(moe.route, first, pairs.input_SD), k),
            "chance": largest(random.random(shape), k),
        }
        return {name: pairs.error(each, moe.routed_scale) for name, each in chosen.items()}


def _centroids(moe: config.MoE, weights) -> dict[str, np.ndarray]:
    """A router of the means of experts' rows, each row at length 1, and of the identity."""
    matrix = input_matrix(moe.expert_kind, "auto")
    name = next(name for name in weights if name.replace("_E", "_", 1) == matrix.name)
    rows_EFD = np.stack([matrix.rows(array) for array in weights[name]])
    rows_EFD = rows_EFD / (np.linalg.norm(rows_EFD, axis=2, keepdims=True) + 1e-12)
    params = {"router_DE": np.ascontiguousarray(rows_EFD.mean(axis=1).T, np.float32)}
    if moe.route.net == "tanh":
        params["mix_SS"] = np.eye(moe.num_experts, dtype=np.float32)
    return params
