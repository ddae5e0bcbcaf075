"""Other rules of choice on trained models: p from 0.1 to 0.7, top-p after top-2, top-k after top-p.

Axis legend: R replicates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import variable_shapes
from dynmoe_jax.registry import with_choice
from dynmoe_jax.study.measures.heldout import loss_of
from dynmoe_jax.study.measures.measure import Measure
from dynmoe_jax.study.measures.trained import Tokens, TrainedRun

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
FIXED = (1, 2, 3)
BISECTIONS = 12
PROBED_BATCHES = 2
"""Batches of each domain on which p is looked for."""


class OtherRules(Measure):
    """MoE-Dynamic and MoE-Top2, each by the rule of the other."""

    def passes(self, model):
        """One for each rule, and some batches to find p."""
        return len(THRESHOLDS) + len(FIXED) if model == "dynamic" else 4

    def is_of(self, model):
        """MoE-Dynamic and MoE-Top2."""
        return model in ("dynamic", "top_2")

    def take(self, run, items):
        """Bits per byte and mean experts by rule; gates are weighed as in training."""
        if run.config.model.moe.router == "top_k":
            return {"rules": [_of_rule("top_k", 2, run.tokens), _top_p_at_the_mean(run)]}
        with_p = HeldThreshold(run, max(THRESHOLDS))
        rules = [_of_rule("top_p", p, with_p(p)) for p in THRESHOLDS]
        return {"rules": rules + [_top_k(run, k) for k in FIXED]}


def _of_rule(rule: str, setting: float, tokens: Tokens) -> dict[str, Any]:
    used = {"rule": rule, "setting": setting, "experts_per_token": tokens.mean_experts}
    return used | loss_of(tokens)


def _top_k(run: TrainedRun, k: int) -> dict[str, Any]:
    """MoE-Dynamic with a fixed number of experts, weighed by their raw probabilities."""
    model = _with_router(run.config.model, "top_k", k=k)
    return _of_rule("top_k", k, run.with_router(model, carried(run.params, model, {})))


def _top_p_at_the_mean(run: TrainedRun) -> dict[str, Any]:
    """MoE-Top2 by top-p, whose p is looked for until as many experts are used."""
    with_p, wanted = HeldThreshold(run, 1.0, renormalize=True), run.config.model.moe.top_k.k
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fewer = with_p(middle, PROBED_BATCHES).mean_experts < wanted
        low, high = (middle, high) if fewer else (low, middle)
    p = (low + high) / 2
    return _of_rule("top_p", p, with_p(p))


class HeldThreshold:
    """The tokens of a run by top-p, for any p by one program.

    The p of a router with a budget is a state, which nothing moves here.

    Args:
      run: the run.
      largest: the largest p that will be asked for.
      renormalize: whether the weights of a token's experts sum to one.
    """

    def __init__(self, run: TrainedRun, largest: float, renormalize: bool = False):
        self._run = run
        self._model = _with_router(
            run.config.model,
            "top_p",
            experts_per_token=1.0,
            max_threshold=largest,
            renormalize=renormalize,
        )

    def __call__(self, p: float, batches: int | None = None) -> Tokens:
        """Held-out tokens, or those of so many batches of each domain."""
        params = carried(self._run.params, self._model, {"threshold": p})
        return self._run.with_router(self._model, params, batches)


def _with_router(model: config.Model, name: str, **values) -> config.Model:
    moe = with_choice(model.moe, "router", [name])
    router = dataclasses.replace(type(getattr(moe, name))(), **values)
    return dataclasses.replace(model, moe=dataclasses.replace(moe, **{name: router}))


def carried(params: nnx.State, model: config.Model, states: dict[str, float]) -> nnx.State:
    """The variables of a model that has those of another one, and states of its routers.

    Args:
      params: of the other one.
      model: settings.
      states: value of every state that the other one lacks, by name.

    Raises:
      KeyError: the model has a variable that is in neither.
    """
    there = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

    def of(path, shape):
        name = jax.tree_util.keystr(path)
        if name in there:
            return there[name]
        (value,) = (value for state, value in states.items() if f"'{state}'" in name)
        return jnp.full(shape.shape, value, shape.dtype)

    return jax.tree.map_with_path(of, variable_shapes(model))
