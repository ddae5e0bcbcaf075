"""Pictures of an analysis of routing, drawn from its record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynmoe_jax.evaluation.report.theme import CYCLE, Canvas, Picture, integer_ticks, legend, light
from dynmoe_jax.runs.formatting import decimals, percent, printable

_MOST_DOMAINS = 24
_BAND = "Bands and bars are 95 % intervals, by a bootstrap over documents."


def routing_pictures(record: Mapping[str, Any], canvas: Canvas) -> dict[str, list[Picture]]:
    """The pictures by the heading that they stand under; headings without any are left out."""
    experts = record["experts_per_token"]
    counts = []
    if not fixed_count(record):
        counts = [
            _surprise(record, canvas),
            _curve(
                experts["by_position"],
                [_range(part["from"], part["to"]) for part in experts["by_position"]],
                "position in what the model reads of a document",
                "Do later tokens need fewer experts?",
                "A document that goes on in the next row begins anew there. " + _BAND,
                canvas,
            ),
            _curve(
                experts["by_place_in_word"],
                [f"{p['place'] + 1}{'+' * p['and_later']}" for p in experts["by_place_in_word"]],
                "piece of a word",
                "Do beginnings of words need more experts?",
                "White space alone is no part of a word. " + _BAND,
                canvas,
            ),
            _domains(experts["by_domain"], canvas),
            _layers(experts["by_layer"], canvas),
        ]
    sections = {
        "What the number of experts depends on": counts,
        "What the choice of experts depends on": [
            _specialization(record["specialization_by_layer"], canvas),
            _context(record["context_independence_by_layer"], canvas),
            _agreement(record.get("agreement", []), canvas),
            _load(record["load_by_layer"], canvas),
        ],
        "Dropped choices": [_dropped(record["dropped"], canvas)],
    }
    found = {title: [p for p in pictures if p] for title, pictures in sections.items()}
    return {title: pictures for title, pictures in found.items() if pictures}


def fixed_count(record: Mapping[str, Any]) -> bool:
    """Whether no token could use more or fewer experts than another."""
    return bool(record["experts_per_token"]["fixed"])


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _with_band(axis, x, parts: Sequence[Mapping], color: str, label: str = "") -> None:
    """Means as a line, their intervals as a band."""
    mean, low, high = (np.array([part[name] for part in parts]) for name in ("mean", "low", "high"))
    axis.fill_between(x, low, high, color=light(color), alpha=0.18, linewidth=0)
    axis.plot(x, mean, color=light(color), marker="o", markersize=3.5, label=label)
    _limits(axis, mean)


def _limits(axis, mean) -> None:
    """Leaves room around the means; an interval of two documents may be wide beyond all use."""
    known = mean[np.isfinite(mean)]
    if known.size:
        low, high = axis.dataLim.y0, axis.dataLim.y1
        spread = max(np.ptp(known), 0.02 * abs(known).max(), 1e-6)
        bounds = known.min() - 1.5 * spread, known.max() + 1.5 * spread
        if math.isfinite(low) and math.isfinite(high):
            bounds = max(bounds[0], low - 0.1 * spread), min(bounds[1], high + 0.1 * spread)
        axis.set_ylim(bounds)


def _curve(parts, names, what: str, title: str, caption: str, canvas: Canvas) -> Picture | None:
    if len(parts) < 2:
        return None
    figure, (axis,) = canvas.figure()
    _with_band(axis, range(len(parts)), parts, "blue")
    axis.set_xticks(range(len(parts)), names, rotation=35 if len(parts) > 6 else 0)
    axis.set(xlabel=what, ylabel="experts per token")
    return canvas.picture(figure, title, caption)


def _surprise(record: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    experts, correlation = record["experts_per_token"], record["correlation_with_surprise"]
    figure, (axis,) = canvas.figure()
    drawn = False
    for key, where, name, color in (
        ("by_surprise_of_predicted_token", "of_predicted_token", "predicted next", "blue"),
        ("by_surprise_of_token_itself", "of_token_itself", "read", "orange"),
    ):
        parts = experts.get(key, [])
        if len(parts) > 1:
            x = [part["surprise"] for part in parts]
            label = f"token that is {name} (rank correlation {_estimate(correlation[where])})"
            _with_band(axis, x, parts, color, label)
            drawn = True
    if not drawn:
        return None
    axis.autoscale(axis="y")
    axis.set(xlabel="surprise: loss in nats", ylabel="experts per token")
    legend(figure)
    return canvas.picture(
        figure,
        "Do tokens that are hard to predict use more experts?",
        "By the model's own loss: of the token that is predicted where the experts are used, and, "
        "apart from it, of the token that is read there. Spearman's correlation is over tokens. "
        + _BAND,
    )


def _estimate(part: Mapping[str, float]) -> str:
    return (
        f"{decimals(part['spearman'], 2)}, {decimals(part['low'], 2)} to "
        f"{decimals(part['high'], 2)}"
    )


def _domains(domains: Mapping[str, Mapping], canvas: Canvas) -> Picture | None:
    if len(domains) < 2:
        return None
    largest = sorted(domains.items(), key=lambda item: -item[1]["tokens"])[:_MOST_DOMAINS]
    shown = sorted(largest, key=lambda item: item[1]["mean"])
    figure, (axis,) = canvas.figure(height=1.2 + 0.26 * len(shown))
    for y, (_, part) in enumerate(shown):
        axis.plot([part["low"], part["high"]], [y, y], color=light("blue"), alpha=0.5)
        axis.plot([part["mean"]], [y], "o", color=light("blue"), markersize=5)
    axis.set_yticks(range(len(shown)), [printable(n)[:28] for n, _ in shown], parse_math=False)
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="experts per token")
    return canvas.picture(figure, "Which text needs more experts?", "By domain. " + _BAND)


def _layers(layers: Sequence[Mapping], canvas: Canvas) -> Picture | None:
    if len(layers) < 2:
        return None
    figure, (axis,) = canvas.figure()
    _with_band(axis, range(len(layers)), layers, "blue")
    return canvas.picture(_by_layer(figure, axis, "experts per token"), "In which layers?", _BAND)


def _by_layer(figure, axis, label: str):
    axis.xaxis.set_major_locator(integer_ticks(13))
    axis.set(xlabel="MoE layer (0 is next to the embedding)", ylabel=label)
    return figure


def _lines(layers: int, lines: Mapping[str, Sequence[float]], label: str, canvas: Canvas):
    """A figure with a line over the layers for each name."""
    figure, (axis,) = canvas.figure()
    for (name, values), color in zip(lines.items(), CYCLE, strict=False):
        dashed = (0, (4, 3)) if "shuffled" in name or "chance" in name else "-"
        axis.plot(range(layers), values, color=light(color), linestyle=dashed, marker="o",
                  markersize=3.5, label=name)  # fmt: skip
    legend(figure)
    return _by_layer(figure, axis, label)


def _specialization(layers: Sequence[Mapping], canvas: Canvas) -> Picture | None:
    if not layers or not any(layer["token"]["of"] for layer in layers):
        return None
    lines = {
        "token id": [layer["token"]["bits"] for layer in layers],
        "token id, shuffled": [layer["token"]["shuffled"] for layer in layers],
        "domain": [layer["domain"]["bits"] for layer in layers],
        "domain, shuffled": [layer["domain"]["shuffled"] for layer in layers],
    }
    whole = np.mean([layer["token"]["of"] for layer in layers])
    return canvas.picture(
        _lines(len(layers), lines, "bits about the first choice", canvas),
        "Do experts specialize?",
        "Mutual information of a token's first choice with its id and with its domain. Dashed: of "
        "the same counts paired at random, which is what so few tokens show of nothing. "
        f"{decimals(float(whole), 2)} bits would be all there is to know.",
    )


def _context(layers: Sequence[Mapping], canvas: Canvas) -> Picture | None:
    if not layers or not any(math.isfinite(layer["token"]) for layer in layers):
        return None
    lines = {
        "token id": [layer["token"] for layer in layers],
        "token id, shuffled": [layer["shuffled"] for layer in layers],
        "position": [layer["position"] for layer in layers],
        "domain": [layer["domain"] for layer in layers],
    }
    figure = _lines(len(layers), lines, "largest share of one expert", canvas)
    figure.axes[0].set_ylim(0, 1.03)
    return canvas.picture(
        figure,
        "Does the token id alone decide?",
        "Context independence (OpenMoE): the share of a token id's occurrences that its most "
        "frequent first choice gets, mean over ids. 1: context does not matter. Dashed: chance. "
        "Beside it the same of positions and domains.",
    )


def _agreement(pairs: Sequence[Mapping], canvas: Canvas) -> Picture | None:
    if not pairs:
        return None
    shown = pairs[-4:]
    lines = {
        f"step {pair['from']:,} to {pair['to']:,}": [part["mean"] for part in pair["by_layer"]]
        for pair in shown
    }
    lines["chance"] = shown[-1]["chance_by_layer"]
    figure = _lines(len(lines["chance"]), lines, "share of tokens", canvas)
    figure.axes[0].set_ylim(0, 1.03)
    return canvas.picture(
        figure,
        "Does routing still change?",
        "Share of tokens whose first choice is the same at two checkpoints that follow each other. "
        "OpenMoE found that it settles early.",
    )


def _load(layers: Sequence[Mapping], canvas: Canvas) -> Picture | None:
    if not layers or not sum(sum(layer["share"]) for layer in layers):
        return None
    figure, (axis,) = canvas.figure()
    busiest = [layer["max_over_mean"] for layer in layers]
    axis.bar(range(len(layers)), busiest, width=0.7, color=light("sky"))
    axis.axhline(1, color=light("ink"), linewidth=1, linestyle=(0, (4, 3)))
    axis.grid(axis="x", visible=False)
    unused = sum(layer["unused"] for layer in layers)
    experts = sum(len(layer["share"]) for layer in layers)
    return canvas.picture(
        _by_layer(figure, axis, "busiest expert / mean expert"),
        "Is the work shared?",
        f"1 is an even load. {unused} of {experts} experts were never chosen.",
    )


def _dropped(dropped: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    if not dropped["dropped"]:
        return None
    from matplotlib.ticker import PercentFormatter

    figure, (axis,) = canvas.figure()
    parts = dropped["by_place_in_row"]
    middle = [(part["from"] + part["to"]) / 2 for part in parts]
    axis.plot(middle, [p["rate"] for p in parts], color=light("red"), marker="o", markersize=3.5)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel="place in the row", ylabel="choices dropped")
    return canvas.picture(
        figure,
        "Are later tokens dropped more?",
        f"{percent(dropped['rate'])} of all choices were dropped. Where earlier tokens come first, "
        "later ones find experts full.",
    )
