"""Question 4: other rules of choice on models that are trained already."""

import math

from dynmoe_jax.evaluation.report.theme import legend, light
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.study.questions.question import Question, Table, in_words, silent
from dynmoe_jax.study.questions.results import Results, of_records
from dynmoe_jax.study.statistics import Estimate, estimate

TRAINED = ("top_p", 0.4)


class OtherRules(Question):
    """Another p, and each rule on the other's model."""

    models = ("dynamic", "top_2")
    title = "May p be changed after training, and top-p follow top-2?"
    measures = ("heldout", "other_rules")

    def answers(self, results):
        """Differences to the rule that a model was trained with."""
        found = []
        if results.have("dynamic"):
            for name, rule, asked in (
                ("p_0.3_is_worse", ("top_p", 0.3), "Is p = 0.3 worse than that of training, 0.4?"),
                ("p_0.5_is_worse", ("top_p", 0.5), "Is p = 0.5 worse than that of training, 0.4?"),
                (
                    "top_2_after_dynamic_is_worse",
                    ("top_k", 2),
                    "Is MoE-Dynamic worse with two experts for every token?",
                ),
            ):
                found.append(
                    silent(
                        name,
                        asked,
                        _less(results, "dynamic", rule, TRAINED),
                        "bits per byte",
                        ("It is worse, by {} bits per byte", "It is better, by {} bits per byte"),
                        of_training=False,
                        digits=4,
                    )
                )
        if results.have("top_2"):
            chosen, fixed = (_only(results, "top_2", rule) for rule in ("top_p", "top_k"))
            found.append(
                silent(
                    "top_p_after_top_2_is_better",
                    f"Is MoE-Top2 better by top-p, with {_used(chosen)} experts on average?",
                    _pairwise(fixed, chosen),
                    "bits per byte",
                    ("It is better, by {} bits per byte", "It is worse, by {} bits per byte"),
                    of_training=False,
                    digits=4,
                )
            )
        return found

    def tables(self, results):
        """All rules."""
        rows = []
        for model, title in (("dynamic", "MoE-Dynamic"), ("top_2", "MoE-Top2")):
            if not results.have(model):
                continue
            records = [result.measures["other_rules"]["rules"] for result in results.of(model)]
            for of_seeds in zip(*records, strict=True):
                experts = estimate([rule["experts_per_token"] for rule in of_seeds])
                setting = estimate([rule["setting"] for rule in of_seeds]).value
                name = (
                    f"top-{setting:g}" if of_seeds[0]["rule"] == "top_k" else f"p = {setting:.3g}"
                )
                loss = in_words(of_records(list(of_seeds), "bits_per_byte"))
                rows.append([f"{title}, {name}", decimals(experts.value, 2), loss])
        header = ["model and rule", "experts per token", "bits per byte"]
        return [Table("Rules on trained models, means over seeds", header, rows)] if rows else []

    def data(self, results):
        """Loss against experts, by model and rule."""
        lines = {}
        for model, rule, title in (
            ("dynamic", "top_p", "MoE-Dynamic, p from 0.1 to 0.7"),
            ("dynamic", "top_k", "MoE-Dynamic, top-1 to top-3"),
            ("top_2", "top_p", "MoE-Top2 by top-p"),
            ("top_2", "top_k", "MoE-Top2"),
        ):
            if results.have(model):
                records = [r.measures["other_rules"]["rules"] for r in results.of(model)]
                points = [p for p in zip(*records, strict=True) if p[0]["rule"] == rule]
                lines[title] = [
                    {
                        "experts": estimate([x["experts_per_token"] for x in point]).value,
                        "loss": of_records(list(point), "bits_per_byte").record(),
                    }
                    for point in points
                ]
        return lines

    def pictures(self, data, canvas):
        """Loss against experts per token."""
        if not data:
            return []
        figure, (axis,) = canvas.figure(height=3.6)
        for (title, points), color in zip(
            data.items(), ("blue", "sky", "orange", "red"), strict=False
        ):
            points = sorted(points, key=lambda point: point["experts"])
            halves = [p["loss"]["high"] - p["loss"]["value"] for p in points]
            axis.errorbar(
                [p["experts"] for p in points], [p["loss"]["value"] for p in points],
                yerr=[half if math.isfinite(half) else 0.0 for half in halves],
                color=light(color), marker="o", markersize=4, capsize=2, label=title,
            )  # fmt: skip
        axis.set(xlabel="experts per token", ylabel="held-out bits per byte")
        legend(figure)
        caption = "The same checkpoints, evaluated again; nothing is trained. Bars: 95 %."
        return [canvas.picture(figure, "Rules changed after training", caption)]


def _used(rules: list[dict]) -> str:
    return decimals(estimate([rule["experts_per_token"] for rule in rules]).value, 2)


def _records(results: Results, model: str, key: tuple[str, float]) -> list[dict]:
    rules = [result.measures["other_rules"]["rules"] for result in results.of(model)]
    return [next(r for r in each if (r["rule"], r["setting"]) == key) for each in rules]


def _only(results: Results, model: str, rule: str) -> list[dict]:
    rules = [result.measures["other_rules"]["rules"] for result in results.of(model)]
    return [next(r for r in each if r["rule"] == rule) for each in rules]


def _less(results: Results, model: str, key, other) -> Estimate:
    return _pairwise(_records(results, model, key), _records(results, model, other))


def _pairwise(ours: list[dict], theirs: list[dict]) -> Estimate:
    """The loss of one rule less that of another, seed by seed and document by document."""
    pairs = list(zip(ours, theirs, strict=True))
    value_S = [a["bits_per_byte"] - b["bits_per_byte"] for a, b in pairs]
    replicate_SR = [
        [x - y for x, y in zip(a["bits_per_byte_R"], b["bits_per_byte_R"], strict=True)]
        for a, b in pairs
    ]
    return estimate(value_S, replicate_SR)
