"""Question 5: what experts cost, and what a budget saves."""

import dataclasses

import numpy as np
from scipy import stats

from dynmoe_jax.evaluation.report.theme import CYCLE, legend, light
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.questions.question import Answer, Question, silent
from dynmoe_jax.study.questions.results import Logged, Result
from dynmoe_jax.study.statistics import estimate, resampled_lines

LEAST_SPREAD = 0.1
"""Experts per token that steps must differ by, for their times to say what an expert costs."""


class Cost(Question):
    """Time and FLOPs against experts."""

    models = ("top_2", "dynamic", "dynamic_budget")
    note = (
        "Seconds are of runs that followed each other, so that other work on the machine counts. "
        "Of runs that were trained side by side nothing is said in seconds."
    )
    title = "What does an expert more cost, and what does a budget save?"

    def answers(self, results):
        """Time of an expert more; savings of the budget, and what they cost in loss."""
        found, alone = [], results.asked.processes == 1
        if results.have("dynamic") and alone:
            slopes = [_expert_in_percent(result) for result in results.of("dynamic")]
            found.append(
                silent(
                    "seconds_of_an_expert",
                    "How much longer does a step take with one expert per token more?",
                    estimate([s for s, _ in slopes], np.array([s_R for _, s_R in slopes])),
                    "percent of a step with two experts",
                    ("A step takes longer, by {} percent", "A step takes less time, by {} percent"),
                    digits=1,
                )
            )
        if results.have("dynamic", "dynamic_budget"):
            pairs = results.pairs("dynamic", "dynamic_budget")
            found.append(
                _saved("flops", "FLOPs of training", [tuple(map(_flops, p)) for p in pairs])
            )
            if alone:
                seconds = [tuple(map(_seconds, pair)) for pair in pairs]
                found.append(_saved("seconds", "seconds of training", seconds))
            found.append(
                silent(
                    "budget_costs_loss",
                    "Is the loss higher for it, after as many steps?",
                    results.loss_less("dynamic_budget", "dynamic"),
                    "bits per byte",
                    ("It is higher, by {}", "It is lower, by {}"),
                ),
            )
        return found

    def data(self, results):
        """Lines of logs, and losses against FLOPs, of the first seed."""
        names = [name for name in results.asked.models if results.have(name)]
        first = {name: results.of(name)[0] for name in names}
        return {
            "steps": {
                MODELS[name].title: {
                    "experts": [line["experts_per_token"] for line in result.metrics[1:]],
                    "seconds": [line["seconds_step"] for line in result.metrics[1:]],
                }
                for name, result in first.items()
                if result.is_moe
            },
            "losses": {
                MODELS[name].title: {
                    "flops": _flops_so_far(first[name]),
                    "loss": [line["lm_loss"] for line in first[name].metrics],
                }
                for name in ("top_2", "dynamic", "dynamic_budget")
                if name in first
            },
        }

    def pictures(self, data, canvas):
        """Seconds of a step against experts, loss against FLOPs."""
        drawn = []
        if data["steps"]:
            figure, (axis,) = canvas.figure(height=3.4)
            for (title, lines), color in zip(data["steps"].items(), CYCLE, strict=False):
                axis.plot(
                    lines["experts"], lines["seconds"], "o", color=light(color), markersize=3,
                    alpha=0.7, label=title,
                )  # fmt: skip
            axis.set(xlabel="experts per token", ylabel="seconds per step")
            axis.set_ylim(bottom=0)
            legend(figure)
            caption = (
                "A point for each line of the log, first seed. Other work on the machine shows."
            )
            drawn.append(canvas.picture(figure, "Time of a step against experts", caption))
        if data["losses"]:
            figure, (axis,) = canvas.figure(height=3.4)
            for (title, lines), color in zip(data["losses"].items(), CYCLE, strict=False):
                axis.plot(lines["flops"], lines["loss"], color=light(color), label=title)
            axis.set(xlabel="FLOPs of training so far", ylabel="training loss, nats per token")
            legend(figure)
            caption = (
                "First seed. A plain top-p model begins with many experts, which a budget spares."
            )
            drawn.append(canvas.picture(figure, "Loss against FLOPs", caption))
        return drawn


def _flops(result: Result) -> Logged:
    """FLOPs of each step."""
    experts = result.logged("experts_per_token")
    flops_X = [result.flops_of_step(each) for each in experts.value_X]
    return dataclasses.replace(experts, value_X=np.array(flops_X))


def _seconds(result: Result) -> Logged:
    """Seconds of each step."""
    return result.step_times


def _saved(name: str, what: str, pairs: list[tuple[Logged, Logged]]) -> Answer:
    """Part of a cost that the second of two runs saves."""
    value_S = [100 * (1 - budget.mean / plain.mean) for plain, budget in pairs]
    replicate_SR = [100 * (1 - budget.mean_R / plain.mean_R) for plain, budget in pairs]
    return silent(
        f"budget_saves_{name}",
        f"Which part of the {what} does a budget save?",
        estimate(value_S, np.array(replicate_SR)),
        "percent",
        ("It saves {} percent", "It costs {} percent more"),
        digits=1,
    )


def _expert_in_percent(result: Result) -> tuple[float, np.ndarray]:
    """Slope of seconds per step over experts, in percent of a step with two; and resampled."""
    usual_X = result.step_times.weight_X > 0
    experts_X = result.logged("experts_per_token").value_X[usual_X]
    seconds_X = result.step_times.value_X[usual_X]
    number_RX = resampled_lines(len(experts_X), result.arm.seed)
    slope_R = [_slope(experts_X[x], seconds_X[x]) for x in number_RX]
    return _slope(experts_X, seconds_X), np.array(slope_R)


def _slope(experts_X: np.ndarray, seconds_X: np.ndarray) -> float:
    if np.ptp(experts_X) < LEAST_SPREAD:
        return float("nan")
    # Theil and Sen's: medians of slopes, which a few slow lines don't bend.
    slope, intercept, *_ = stats.theilslopes(seconds_X, experts_X)
    return float(100 * slope / (intercept + 2 * slope))


def _flops_so_far(result: Result) -> list[float]:
    """FLOPs up to each line of the log."""
    flops = _flops(result)
    return np.cumsum(flops.weight_X * flops.value_X).tolist()
