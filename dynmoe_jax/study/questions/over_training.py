"""Question 2: experts per token over training, with and without entropy loss, with a budget."""

import math

from dynmoe_jax.evaluation.report.theme import CYCLE, legend, light
from dynmoe_jax.runs.formatting import compact
from dynmoe_jax.study.models import MODELS
from dynmoe_jax.study.plan import LAST_SHARE
from dynmoe_jax.study.questions.question import Question, claimed, silent

EARLY = (0.06, 0.16)
"""Part of training that stands for the paper's first figure, at 8 of 100 billion tokens."""

_SHOWN = ("dynamic", "dynamic_no_entropy", "dynamic_budget")


class OverTraining(Question):
    """Experts per token over training."""

    title = "Do tokens need fewer experts as training goes on, and why?"

    def answers(self, results):
        """The fall, the part of the entropy loss, and the budget."""
        found = []
        if results.have("dynamic"):
            fall = results.mean("dynamic", lambda r: _early(r) - r.reached)
            found.append(
                claimed(
                    "experts_fall",
                    "Does MoE-Dynamic use fewer experts at the end than early on?",
                    fall,
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
            less = results.paired(
                "dynamic_no_entropy", "dynamic", lambda a, b: a.reached - b.reached
            )
            found.append(
                claimed(
                    "entropy_loss_lowers_experts",
                    "Does the entropy loss lower the number of experts?",
                    less,
                    "experts per token at the end",
                    (
                        "The entropy loss lowers the number of experts, by {}",
                        "The entropy loss raises the number of experts, by {}",
                    ),
                    "Without it routers stay unsure, and more experts are used (section 2.3).",
                )
            )
        if results.have("dynamic_budget"):
            off = results.mean("dynamic_budget", _off_budget)
            found.append(
                silent(
                    "budget_is_held",
                    "How far is the mean over 20 logged steps from the budget at worst, from a "
                    "tenth of training on?",
                    off,
                    "percent",
                    ("At worst it is off by {} percent", "It is never off: {} percent"),
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
            for model in _SHOWN
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


def _early(result) -> float:
    return result.between(*EARLY, "experts_per_token")


def _off_budget(result) -> float:
    """Largest distance of a mean over neighboring lines from the budget, in percent of it."""
    budget = result.config.model.moe.top_p.experts_per_token
    first = LAST_SHARE * result.config.train.steps
    experts = [line["experts_per_token"] for line in result.metrics if line["step"] > first]
    every = result.config.train.log_every_steps
    span = max(1, math.ceil(20 / every))
    means = [sum(experts[i : i + span]) / span for i in range(len(experts) - span + 1)]
    return 100 * max((abs(mean - budget) / budget for mean in means), default=math.nan)
