"""Question 2: experts per token over training, with and without entropy loss, with a budget."""

import dataclasses

import numpy as np

from dynmoe_jax.evaluation.report.theme import CYCLE, legend, light
from dynmoe_jax.runs.formatting import compact
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.comparison.plan import LAST_SHARE
from dynmoe_jax.study.questions.question import Question, claimed, silent
from dynmoe_jax.study.questions.results import Logged, Result, Results, of_logs
from dynmoe_jax.study.statistics import Estimate, estimate

EARLY = (0.06, 0.16)
"""Part of training that stands for the paper's first figure, at 8 of 100 billion tokens."""

PAPER_WEIGHT = 1e-4
"""Of the paper's entropy loss (beta)."""


class OverTraining(Question):
    """Experts per token over training."""

    models = ("dynamic", "dynamic_no_entropy", "dynamic_budget")
    title = "Do tokens need fewer experts as training goes on, and why?"

    def answers(self, results):
        """The fall, the part of the entropy loss, and the budget."""
        found = []
        if results.have("dynamic"):
            found.append(
                claimed(
                    "experts_fall",
                    "Does MoE-Dynamic use fewer experts at the end than early on?",
                    _less([(_early(r), r.reached) for r in results.of("dynamic")]),
                    "experts per token",
                    (
                        "The number of experts falls over training, by {}",
                        "The number of experts rises over training, by {}",
                    ),
                    "From 2.42 at 8 billion tokens to 1.82 at 100 billion.",
                    reason=f"These models saw {compact(results.tokens)} tokens.",
                )
            )
        if results.have("dynamic", "dynamic_no_entropy"):
            pairs = results.pairs("dynamic_no_entropy", "dynamic")
            found.append(
                claimed(
                    "entropy_loss_lowers_experts",
                    "Does the entropy loss lower the number of experts? Its weight is "
                    f"{_weight(results):g} here, {PAPER_WEIGHT:g} in the paper.",
                    _less([(without.reached, plain.reached) for without, plain in pairs]),
                    "experts per token at the end",
                    (
                        "The entropy loss lowers the number of experts, by {}",
                        "The entropy loss raises the number of experts, by {}",
                    ),
                    "Without it routers stay unsure, and more experts are used (section 2.3).",
                    reason=f"These models saw {compact(results.tokens)} tokens.",
                )
            )
        if results.have("dynamic_budget"):
            found.append(
                silent(
                    "budget_is_held",
                    "How far is the mean from the budget, from a tenth of training on?",
                    of_logs([_off_budget(r) for r in results.of("dynamic_budget")]),
                    "percent of the budget",
                    ("It is above, by {} percent", "It is below, by {} percent"),
                    digits=2,
                )
            )
        return found

    def data(self, results):
        """Curves of every seed."""
        return {
            MODELS[model].title: [
                {
                    "step": [line["step"] for line in result.metrics],
                    "experts": [line["experts_per_token"] for line in result.metrics],
                }
                for result in results.of(model)
            ]
            for model in self.models
            if results.have(model)
        }

    def pictures(self, data, canvas):
        """Experts per token against steps."""
        if not data:
            return []
        figure, (axis,) = canvas.figure(height=3.4)
        for (title, curves), color in zip(data.items(), CYCLE, strict=False):
            for number, curve in enumerate(curves):
                label = {} if number else {"label": title}
                axis.plot(curve["step"], curve["experts"], color=light(color), **label)
        axis.set(xlabel="step", ylabel="experts per token")
        axis.set_ylim(bottom=0)
        legend(figure)
        caption = "Mean over the tokens of a batch and all layers; a line for each seed."
        return [canvas.picture(figure, "Experts per token over training", caption)]


def _weight(results: Results) -> float:
    """Weight of the entropy loss of MoE-Dynamic."""
    return results.of("dynamic")[0].config.loss.entropy.weight


def _early(result: Result) -> Logged:
    return result.logged("experts_per_token", *EARLY)


def _less(pairs: list[tuple[Logged, Logged]]) -> Estimate:
    """The mean of one log less that of another, over seeds."""
    value_S = [ours.mean - theirs.mean for ours, theirs in pairs]
    return estimate(value_S, np.array([ours.mean_R - theirs.mean_R for ours, theirs in pairs]))


def _off_budget(result: Result) -> Logged:
    """Distance from the budget in percent of it, line by line."""
    budget = result.config.model.moe.top_p.experts_per_token
    experts = result.logged("experts_per_token", LAST_SHARE)
    return dataclasses.replace(experts, value_X=100 * (experts.value_X / budget - 1))
