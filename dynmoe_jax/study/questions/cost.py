"""Question 5: what experts cost, and what a budget saves."""

import numpy as np
from scipy import stats

from dynmoe_jax.evaluation.report.theme import CYCLE, legend, light
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.study.models import MODELS
from dynmoe_jax.study.questions.question import Question, silent
from dynmoe_jax.study.results import Result


class Cost(Question):
    """Time and FLOPs against experts."""

    title = "What does an expert more cost, and what does a budget save?"

    def answers(self, results):
        """Time of an expert more; savings of the budget, and what they cost in loss."""
        found = []
        if results.have("dynamic"):
            found.append(
                silent(
                    "seconds_of_an_expert",
                    "How much longer does a step take with one expert per token more?",
                    results.mean("dynamic", _seconds_of_an_expert),
                    "percent of a step with two experts",
                    ("A step takes longer, by {} percent", "A step takes less time, by {} percent"),
                    digits=1,
                )
            )
        if results.have("dynamic", "dynamic_budget"):
            for name, what, number in (
                ("flops", "FLOPs of training", lambda r: r.training_flops),
                ("seconds", "seconds of training", lambda r: r.seconds),
            ):
                saved = results.paired(
                    "dynamic",
                    "dynamic_budget",
                    lambda plain, budget, n=number: 100 * (1 - n(budget) / n(plain)),
                )
                found.append(
                    silent(
                        f"budget_saves_{name}",
                        f"Which part of the {what} does a budget save?",
                        saved,
                        "percent",
                        ("It saves {} percent", "It costs {} percent more"),
                        digits=1,
                    )
                )
            found.append(
                silent(
                    "budget_costs_loss",
                    "Is the loss higher for it, after as many steps?",
                    results.loss_less("dynamic_budget", "dynamic"),
                    "bits per byte",
                    ("It is higher, by {}", "It is lower, by {}"),
                )
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


def _seconds_of_an_expert(result: Result) -> float:
    """Slope of seconds per step over experts, in percent of a step with two."""
    lines = result.metrics[1:]
    experts = np.array([line["experts_per_token"] for line in lines])
    seconds = np.array([line["seconds_step"] for line in lines])
    if np.ptp(experts) < 0.1:
        return float("nan")
    # Theil and Sen's: medians of slopes, which a few slow lines don't bend.
    slope, intercept, *_ = stats.theilslopes(seconds, experts)
    return float(100 * slope / (intercept + 2 * slope))


def _flops_so_far(result: Result) -> list[float]:
    """FLOPs up to each line of the log."""
    steps = np.array([line["step"] for line in result.metrics], float)
    used = np.array([line["experts_per_token"] for line in result.metrics])
    model, data, train = result.config.model, result.config.data, result.config.train
    tokens = train.batch_size * data.seq_len
    layers = model.num_moe_layers
    of_step = [
        training_flops(model, tokens, data.seq_len, experts * tokens * layers) for experts in used
    ]
    return np.cumsum(np.diff(steps, prepend=0.0) * of_step).tolist()
