"""Question 1: quality against active parameters, FLOPs and seconds."""

import math

import numpy as np

from dynmoe_jax.evaluation.paper import MEAN
from dynmoe_jax.evaluation.report.theme import CYCLE, legend, light
from dynmoe_jax.runs.formatting import compact, decimals
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.questions.question import Answer, Question, Table, claimed
from dynmoe_jax.study.questions.results import Result, Results, of_logs, of_records
from dynmoe_jax.study.statistics import REPLICATES, Estimate, estimate

_AXES = {
    "active_parameters": "active parameters of a token",
    "flops": "FLOPs of training",
    "seconds": "seconds of training",
}
_MARKERS = "osD^vPX"
_SHORT = "The paper's models saw 100 billion tokens, these {}."


class Quality(Question):
    """Is MoE-Dynamic better than MoE-Top2, with fewer experts?"""

    title = "Is MoE-Dynamic better than MoE-Top2, with fewer active parameters?"
    models = tuple(name for name, model in MODELS.items() if not model.ablation)
    measures = ("heldout", "items")

    def answers(self, results):
        """Loss of neighbors, experts in training and at inference, accuracy where it says much."""
        found, short = [], _SHORT.format(compact(results.tokens))
        for name, model, other, paper in (
            ("dynamic_beats_top_2", "dynamic", "top_2", ("top-p", "top-2")),
            ("top_2_beats_dense", "top_2", "dense", ("top-2", "dense 374M")),
            ("dynamic_beats_wider_dense", "dynamic", "wide_dense", ("top-p", "dense 570M")),
        ):
            if results.have(model, other):
                found.append(_better(results, name, model, other, paper, short))
        if results.have("dynamic"):
            found += _experts(results, short)
        if results.have("dynamic", "top_2"):
            found += _accuracy(results)
        return found

    def tables(self, results):
        """All models."""
        header = ["model", "bits per byte", "experts, training", "experts, inference"]
        header += ["active parameters", "FLOPs", "seconds"]
        rows = []
        for model in results.asked.models:
            if not results.have(model):
                continue
            means = {
                name: results.mean(model, lambda r, name=name: r.record()[name]).value
                for name in (
                    "experts_per_token_in_training",
                    "experts_per_token_at_inference",
                    *_AXES,
                )
            }
            rows.append(
                [
                    MODELS[model].title,
                    _over_seeds(results.loss(model)),
                    decimals(means["experts_per_token_in_training"], 2),
                    decimals(means["experts_per_token_at_inference"], 2),
                    compact(means["active_parameters"]),
                    f"{means['flops']:.2e}",
                    decimals(means["seconds"], 0),
                ]
            )
        title = "Means over seeds; of the loss, the 95 % half-width of seeds"
        tables = [Table(title, header, rows)]
        if accuracies := _accuracy_table(results):
            tables.append(accuracies)
        return tables

    def data(self, results):
        """Points of each model."""
        points = {}
        for model in results.asked.models:
            if results.have(model):
                loss = results.loss(model)
                points[MODELS[model].title] = {"loss": loss.record()} | {
                    axis: results.mean(model, lambda r, axis=axis: r.record()[axis]).value
                    for axis in _AXES
                }
        return {"points": points}

    def pictures(self, data, canvas):
        """Loss against what it costs."""
        return [_against(axis, data["points"], canvas) for axis in _AXES]


def _better(results: Results, name, model, other, paper, short) -> Answer:
    found = results.loss_less(other, model)
    ours, theirs = MODELS[model].title, MODELS[other].title
    return claimed(
        name,
        f"Is {ours} better than {theirs}?",
        found,
        "bits per byte that it needs less",
        (
            f"{ours} needs fewer bits per byte than {theirs}, by {{}}",
            f"{ours} needs more bits per byte than {theirs}, by {{}}",
        ),
        f"Mean accuracy {MEAN.accuracy[paper[0]]:g} against {MEAN.accuracy[paper[1]]:g}.",
        reason=short,
    )


def _experts(results: Results, short: str) -> list[Answer]:
    used = of_records([r.heldout for r in results.of("dynamic")], "experts_per_token")
    inference = used.less_than(2)
    training = of_logs([r.logged("experts_per_token") for r in results.of("dynamic")]).plus(-2)
    return [
        claimed(
            "fewer_experts_than_top_2_at_inference",
            "Does MoE-Dynamic use fewer than two experts at inference?",
            inference,
            "experts per token below 2",
            (
                "At inference it uses fewer than two experts, by {}",
                "At inference it uses more than two experts, by {}",
            ),
            f"{MEAN.experts:g} experts per token at inference.",
            reason=short,
        ),
        claimed(
            "more_experts_than_top_2_in_training",
            "Does it use more than two over all of training?",
            training,
            "experts per token above 2",
            (
                "Over training it uses more than two experts, by {}",
                "Over training it uses fewer than two experts, by {}",
            ),
            "About 2.17 on average over training.",
            reason=f"{short} Its entropy loss weighs more here.",
        ),
    ]


def _tasks(results: Results) -> dict[str, dict]:
    """Tasks of MoE-Top2 and MoE-Dynamic: accuracies of each seed, chance, whether above it."""
    found = {}
    both = [r.measures.get("items", {}) for m in ("dynamic", "top_2") for r in results.of(m)]
    for task in both[0] if both else ():
        records = [record[task] for record in both if task in record]
        chance, items = records[0]["chance"], records[0]["items"]
        accuracy = [record["accuracy"] for record in records]
        mean = sum(accuracy) / len(accuracy)
        error = math.sqrt(max(mean * (1 - mean), 1e-9) / items)
        found[task] = {
            "chance": chance,
            "accuracy": mean,
            "above": math.isfinite(chance) and mean - 1.96 * error > chance,
        }
    return found


def _accuracy(results: Results) -> list[Answer]:
    """The mean over the tasks that these models can do at all."""
    tasks = [task for task, of_task in _tasks(results).items() if of_task["above"]]
    pairs = results.pairs("dynamic", "top_2")
    if not tasks:
        return []
    gains = [[_gains(ours, theirs, task) for task in tasks] for ours, theirs in pairs]
    value_S = [100 * np.mean([gain.mean() for gain in of_seed]) for of_seed in gains]
    replicate_SR = [100 * np.mean([_resampled(g) for g in of_seed], axis=0) for of_seed in gains]
    return [
        claimed(
            "accuracy",
            f"Does MoE-Dynamic answer more than MoE-Top2, mean over {', '.join(tasks)}?",
            estimate(value_S, np.array(replicate_SR)),
            "points of accuracy",
            ("It answers more, by {}", "It answers fewer, by {}"),
            "0.7 points more, mean over five tasks.",
            reason=_SHORT.format(compact(results.tokens)),
            digits=1,
        )
    ]


def _gains(ours: Result, theirs: Result, task: str) -> np.ndarray:
    """Items that one model answers and the other does not: 1, or -1 the other way round."""
    right = [np.array(result.measures["items"][task]["right"]) for result in (ours, theirs)]
    return right[0] - right[1]


def _resampled(gain_I: np.ndarray) -> np.ndarray:
    """Means of resampled items, the same ones for every seed."""
    draw = np.random.default_rng(len(gain_I))
    return gain_I[draw.integers(0, len(gain_I), (REPLICATES, len(gain_I)))].mean(axis=1)


def _accuracy_table(results: Results) -> Table | None:
    tasks = _tasks(results) if results.have("dynamic", "top_2") else {}
    if not tasks:
        return None
    rows = []
    for model in results.asked.models:
        accuracies = [
            [r.measures["items"][task]["accuracy"] for r in results.of(model)] for task in tasks
        ]
        if all(accuracies):
            means = (estimate(values).value for values in accuracies)
            rows.append([MODELS[model].title, *(decimals(100 * mean, 1) for mean in means)])
    chance = [decimals(100 * of_task["chance"], 1) for of_task in tasks.values()]
    rows.append(["a guess", *chance])
    rows.append(["above chance", *("yes" if t["above"] else "no" for t in tasks.values())])
    return Table("Accuracy in percent, mean over seeds", ["model", *tasks], rows)


def _over_seeds(found: Estimate) -> str:
    half = f" ± {decimals(found.seed_half, 3)}" if math.isfinite(found.seed_half) else ""
    return f"{decimals(found.value, 3)}{half}"


def _against(axis: str, points: dict, canvas):
    """A picture of the loss of all models against one cost."""
    figure, (plot,) = canvas.figure(height=3.4)
    looks = zip(_MARKERS, CYCLE * 2, strict=False)
    for (title, point), (marker, color) in zip(points.items(), looks, strict=False):
        loss, half = point["loss"], point["loss"]["seed_half"]
        bar = half if math.isfinite(half) else None
        plot.errorbar(
            point[axis], loss["value"], yerr=bar, fmt=marker, color=light(color), capsize=3,
            label=title,
        )  # fmt: skip
    plot.set(xlabel=_AXES[axis], ylabel="held-out bits per byte")
    legend(figure)
    return canvas.picture(
        figure,
        f"Loss against {_AXES[axis]}",
        "Lower and further left is better. Bars: 95 % over seeds.",
    )
