"""Question 3: do harder tokens get more experts, and what else does their number depend on?"""

from dynmoe_jax.evaluation.report.theme import CYCLE, legend, light
from dynmoe_jax.evaluation.routing.figures import routing_pictures
from dynmoe_jax.runs.formatting import compact, decimals
from dynmoe_jax.study.questions.question import Answer, Question, Table, claimed, in_words, silent
from dynmoe_jax.study.questions.results import Results, of_records
from dynmoe_jax.study.statistics import Estimate

SHOWN_TOKENS = 8
NEGLIGIBLE = 0.05
"""Rank correlation below which tokens hardly differ."""

_KINDS = {
    "predicted": "loss of the predicted token",
    "itself": "surprise of the token that is read",
    "within_token_ids": "loss of the predicted token, within token ids",
    "across_token_ids": "loss of the predicted token, across token ids",
    "within_layers": "loss of the predicted token, within layers",
    "all_layers": "loss of the predicted token, layers together",
}
_MODELS = {
    "trained": "trained",
    "untrained": "router never trained",
    "shuffled": "shuffled within token ids",
}


_MORE = (
    "They use more: rank correlation {}",
    "They use fewer: rank correlation below 0 by {}",
)
_SURPRISES = (
    (
        "harder_tokens_get_more_experts",
        "Do tokens whose successor is hard to predict use more experts?",
        "predicted",
    ),
    (
        "surprising_tokens_get_more_experts",
        "Do tokens that were themselves a surprise use more experts?",
        "itself",
    ),
)
_CONTROLS = (
    (
        "more_than_untrained",
        "Is the correlation larger than that of routers that were never trained?",
        "untrained",
    ),
    (
        "more_than_shuffled",
        "Is it larger than that of experts shuffled among tokens of the same id?",
        "shuffled",
    ),
)
"""(name, question, kind of correlation or control) of answers."""


class Hardness(Question):
    """Do harder tokens get more experts?"""

    models = ("dynamic",)
    title = "Do harder tokens get more experts?"
    note = (
        "What the paper says is of tasks: BIG-Bench-Hard uses 1.87 experts per token, the others "
        "1.72 to 1.76. Here it is asked of tokens, and the loss of the model itself says which of "
        "them are hard."
    )
    measures = ("heldout", "hardness")

    def answers(self, results):
        """Correlations, the same less those of controls, and the layers."""
        if not results.have("dynamic"):
            return []
        bottom = [r.measures["hardness"]["bottom_less_top"] for r in results.of("dynamic")]
        return [
            *(_of_tasks(results, *asked) for asked in _SURPRISES),
            silent(
                "harder_occurrences_get_more_experts",
                "Among occurrences of the same token id, do harder ones use more experts?",
                _of(results, "trained", "within_token_ids"),
                "rank correlation within token ids",
                _MORE,
                of_training=False,
            ),
            *(_beside(results, *control) for control in _CONTROLS),
            claimed(
                "bottom_layers_use_more",
                "Does the lowest layer use more experts than the highest?",
                of_records(bottom, "value"),
                "experts per token",
                ("It uses more, by {}", "It uses fewer, by {}"),
                "Up to 4 in the lowest layers, about 1 in the highest.",
                reason="The paper's model has 24 layers.",
            ),
        ]

    def tables(self, results):
        """All correlations beside those of the controls."""
        if not results.have("dynamic"):
            return []
        rows = [
            [words, *(in_words(_of(results, model, kind)) for model in _MODELS)]
            for kind, words in _KINDS.items()
        ]
        header = ["rank correlation of experts with", *_MODELS.values()]
        untrained = results.mean("dynamic", lambda r: r.measures["hardness"]["experts_untrained"])
        title = (
            "Rank correlations with 95 % intervals. Untrained routers use "
            f"{decimals(untrained.value, 2)} experts per token"
        )
        routing = results.of("dynamic")[0].measures["hardness"]["routing"]
        return [Table(title, header, rows), _token_ids(routing["experts_per_token"]["by_token"])]

    def data(self, results):
        """Correlations by layer, and the analysis of the first seed."""
        if not results.have("dynamic"):
            return {}
        first = results.of("dynamic")[0].measures["hardness"]
        layers = len(first["trained"]["by_layer"])
        return {
            "kinds": {
                words: {model: _of(results, model, kind).record() for model in _MODELS}
                for kind, words in _KINDS.items()
            },
            "by_layer": {
                model: [
                    _correlation([m["by_layer"][n] for m in _records(results, model)]).record()
                    for n in range(layers)
                ]
                for model in _MODELS
            },
            "routing": first["routing"],
        }

    def pictures(self, data, canvas):
        """Correlations beside the controls, by layer, and what the analysis of routing draws."""
        if not data:
            return []
        drawn = [_bars(data["kinds"], canvas), _layers(data["by_layer"], canvas)]
        return drawn + [
            p for part in routing_pictures(data["routing"], canvas).values() for p in part
        ]


def _token_ids(by_token: dict) -> Table:
    """Token ids that use most and fewest experts, of those that are met often enough."""
    groups = (("most experts", "most_experts"), ("fewest experts", "fewest_experts"))
    rows = [
        [
            f"{title}: {token['text']!r}",
            decimals(token["mean"], 2),
            f"{decimals(token['low'], 2)} to {decimals(token['high'], 2)}",
            f"{token['tokens']:,}",
        ]
        for title, name in groups
        for token in by_token[name][:SHOWN_TOKENS]
    ]
    title = (
        f"Token ids that occur {by_token['least_tokens']} times or more, first seed, experts per "
        "token as the mean over layers"
    )
    return Table(title, ["token id", "experts", "95 %", "times"], rows)


def _of_tasks(results: Results, name: str, question: str, kind: str) -> Answer:
    """Answer to what the paper says of tasks, asked of tokens."""
    return claimed(
        name,
        question,
        _of(results, "trained", kind),
        "Spearman's rank correlation",
        _MORE,
        "Harder tasks use more experts.",
        least=NEGLIGIBLE,
        of_training=False,
        reason=f"These models saw {compact(results.tokens)} tokens, the paper's 1e11.",
    )


def _beside(results: Results, name: str, question: str, control: str) -> Answer:
    """Answer to whether the correlation is larger than a control's."""
    words = ("It is larger, by {}", "It is smaller, by {}")
    unit = "difference of rank correlations"
    return silent(name, question, _less(results, control), unit, words, of_training=False)


def _records(results: Results, model: str) -> list[dict]:
    return [result.measures["hardness"][model] for result in results.of("dynamic")]


def _of(results: Results, model: str, kind: str) -> Estimate:
    return _correlation([record[kind] for record in _records(results, model)])


def _correlation(records: list[dict]) -> Estimate:
    return of_records(records, "value").cut(-1.0, 1.0)


def _less(results: Results, control: str) -> Estimate:
    """The correlation of the trained model less that of a control."""

    def less(ours: dict, theirs: dict) -> dict:
        pairs = zip(ours["value_R"], theirs["value_R"], strict=True)
        return {"value": ours["value"] - theirs["value"], "value_R": [a - b for a, b in pairs]}

    trained, other = _records(results, "trained"), _records(results, control)
    pairs = zip(trained, other, strict=True)
    return of_records([less(a["predicted"], b["predicted"]) for a, b in pairs], "value")


def _errors(estimates: list[dict]):
    return [
        [e["value"] - e["low"] for e in estimates],
        [e["high"] - e["value"] for e in estimates],
    ]


def _bars(kinds: dict, canvas):
    figure, (axis,) = canvas.figure(height=3.9)
    for offset, ((model, title), color) in enumerate(zip(_MODELS.items(), CYCLE, strict=False)):
        estimates = [of_kind[model] for of_kind in kinds.values()]
        places = [number + 0.22 * (offset - 1) for number in range(len(kinds))]
        axis.errorbar(
            [e["value"] for e in estimates], places, xerr=_errors(estimates), fmt="o",
            color=light(color), label=title, markersize=4, capsize=2,
        )  # fmt: skip
    axis.axvline(0, color=light("ink"), linewidth=1)
    short = [words.replace("loss of the predicted token", "predicted") for words in kinds]
    short = [words.replace("surprise of the token that is read", "read") for words in short]
    axis.set_yticks(range(len(kinds)), short)
    axis.invert_yaxis()
    axis.set(xlabel="rank correlation with the number of experts")
    legend(figure)
    return canvas.picture(
        figure,
        "Experts and surprise",
        "Of the token that is predicted where the experts are used, and, apart from it, of the one "
        "that is read there. Shuffled within token ids, only what the id says is left. Bars: 95 %.",
    )


def _layers(by_layer: dict, canvas):
    figure, (axis,) = canvas.figure()
    for (model, title), color in zip(_MODELS.items(), CYCLE, strict=False):
        estimates = by_layer[model]
        axis.errorbar(
            range(len(estimates)), [e["value"] for e in estimates], yerr=_errors(estimates),
            color=light(color), marker="o", markersize=3.5, capsize=2, label=title,
        )  # fmt: skip
    axis.axhline(0, color=light("ink"), linewidth=1)
    axis.set(xlabel="MoE layer (0 is next to the embedding)", ylabel="rank correlation")
    legend(figure)
    caption = "With the loss of the predicted token, of each layer's own number of experts."
    return canvas.picture(figure, "Correlation by layer", caption)
