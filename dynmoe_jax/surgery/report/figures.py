"""Pictures of a result beside its parent, drawn from its record.

Axis legend: N layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynmoe_jax.evaluation.report.routing_figures import load_picture
from dynmoe_jax.evaluation.report.theme import CYCLE, Canvas, Picture, integer_ticks, legend, light
from dynmoe_jax.runs.formatting import printable

SIDES = {"before": "orange", "after": "blue"}
_MOST_DOMAINS = 24
_SMALL = 1e-6
"""Nats of KL that rounding alone makes."""

_BY_LAYER = "layer (0 is next to the embedding)"


def domain_pictures(record: Mapping[str, Any], canvas: Canvas) -> list[Picture | None]:
    """Pictures of the held-out text by domain."""
    found = record["compared"]["domains"]
    largest = sorted(found.items(), key=lambda item: -item[1]["tokens"])[:_MOST_DOMAINS]
    if not largest:
        return []
    names = [printable(name)[:28] for name, _ in largest]
    return [
        _bits(names, [part for _, part in largest], canvas),
        _kl(names, [part for _, part in largest], canvas),
    ]


def layer_pictures(record: Mapping[str, Any], canvas: Canvas) -> list[Picture | None]:
    """Pictures of the experts of every layer, and of what routers do with them."""
    sides = {side: record[side] for side in SIDES}
    return [
        _experts(sides, canvas),
        *(_load(side, part, canvas) for side, part in sides.items()),
        _per_token(sides, canvas),
        _entropy(sides, canvas),
    ]


# ── Domains ──────────────────────────────────────────────────────────────────────────────────────


def _bits(names: Sequence[str], parts: Sequence[Mapping], canvas: Canvas) -> Picture:
    figure, axis = _rows_of(names, canvas, bars=2)
    for place, (side, color) in enumerate(SIDES.items()):
        y = np.arange(len(names)) + 0.38 * (place - 0.5)
        axis.barh(y, [p[f"bits_{side}"] for p in parts], 0.36, color=light(color), label=side)
    axis.set(xlabel="bits per byte")
    legend(figure)
    return canvas.picture(
        figure,
        "Held-out text: how well is it predicted?",
        "Bits per byte of documents that no run here is trained on; less is better. Equal bars: "
        "nothing was lost.",
    )


def _kl(names: Sequence[str], parts: Sequence[Mapping], canvas: Canvas) -> Picture | None:
    values = [part["kl"] for part in parts]
    if max(values) < _SMALL:
        return None  # bars of rounding
    figure, axis = _rows_of(names, canvas, bars=1)
    axis.barh(range(len(names)), values, 0.6, color=light("purple"))
    axis.set(xlabel="KL(before || after), nats per token")
    return canvas.picture(
        figure,
        "How far apart are the two models?",
        "Mean over tokens of the divergence between the two distributions of the next token; 0 "
        "where they are the same.",
    )


def _rows_of(names: Sequence[str], canvas: Canvas, bars: int):
    """(figure, axis) with a row for each name, the first on top."""
    figure, (axis,) = canvas.figure(height=1.3 + (0.14 + 0.2 * bars) * len(names))
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    return figure, axis


# ── Layers ───────────────────────────────────────────────────────────────────────────────────────


def _experts(sides: Mapping[str, Mapping], canvas: Canvas) -> Picture:
    figure, axes = canvas.figure(rows=2, height=4.2)
    for side, part in sides.items():
        layers = part["layers"]
        heights = [max(1, each["experts"]) for each in layers], [each["width"] for each in layers]
        looks = {"before": {"fill": True, "alpha": 0.45}, "after": {"linewidth": 1.8}}[side]
        for axis, values in zip(axes, heights, strict=True):
            edges = np.arange(len(layers) + 1) - 0.5
            axis.stairs(values, edges, color=light(SIDES[side]), label=side, **looks)
            axis.grid(axis="x", visible=False)
            axis.set_ylim(0, 1.1 * max(axis.dataLim.y1, 1))
    axes[0].yaxis.set_major_locator(integer_ticks(5))
    axes[0].set(ylabel="experts")
    axes[1].set(ylabel="width of each")
    axes[1].set(xlabel=_BY_LAYER)
    _whole_layers(axes[1])
    legend(figure)
    return canvas.picture(
        figure,
        "How many experts has each layer, and how wide are they?",
        "A dense feed-forward counts as one expert. The width is the hidden width of one.",
    )


def _load(side: str, part: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    load = part["load"]
    if not sum(map(sum, load.values())):
        return None
    title = f"Which experts do the work, {side}?"
    return load_picture(list(load.values()), canvas, title, list(load))


def _per_token(sides: Mapping[str, Mapping], canvas: Canvas) -> Picture | None:
    curves = {
        side: {int(layer): sum(shares) for layer, shares in part["load"].items()}
        for side, part in sides.items()
    }
    return _curves(
        curves,
        "experts per token",
        "How many experts does a token use?",
        "Mean over held-out tokens, by layer.",
        canvas,
    )


def _entropy(sides: Mapping[str, Mapping], canvas: Canvas) -> Picture | None:
    curves = {
        side: {int(layer): nats for layer, nats in part["router_entropy"].items()}
        for side, part in sides.items()
    }
    even = {
        side: {
            int(layer): math.log(part["layers"][int(layer)]["experts"])
            for layer in part["router_entropy"]
        }
        for side, part in sides.items()
    }
    return _curves(
        curves,
        "entropy, nats",
        "How sure are the routers?",
        "Entropy of a router's probabilities, mean over held-out tokens. Dashed: that of an even "
        "choice among all experts, which a new router begins near.",
        canvas,
        even,
    )


Curve = Mapping[int, float]
"""Value by the number of the layer."""


def _curves(
    curves: Mapping[str, Curve],
    label: str,
    title: str,
    caption: str,
    canvas: Canvas,
    dashed: Mapping[str, Curve] | None = None,
) -> Picture | None:
    """A line over the layers for each side that has any; None where none has."""
    if not any(curves.values()):
        return None
    figure, (axis,) = canvas.figure()
    for side, curve in curves.items():
        if not curve:
            continue
        color = light(SIDES[side])
        bound = (dashed or {}).get(side, {})
        axis.plot(list(bound), list(bound.values()), color=color, alpha=0.6, dashes=(4, 3))
        axis.plot(list(curve), list(curve.values()), "o-", color=color, markersize=3.5, label=side)
    axis.set_ylim(0, 1.1 * axis.dataLim.y1)
    axis.set(xlabel=_BY_LAYER, ylabel=label)
    _whole_layers(axis)
    legend(figure)
    return canvas.picture(figure, title, caption)


def choices_picture(
    found: Mapping[str, Mapping[str, float]], names: Sequence[str], canvas: Canvas
) -> Picture | None:
    """Picture of the error of every layer by who chose.

    Args:
      found: numbers by layer and name.
      names: of the operation's own choice, then of its controls.
      canvas: that draws it.
    """
    known = [name for name in names if any(name in own for own in found.values())]
    if not known:
        return None
    figure, (axis,) = canvas.figure()
    for number, name in enumerate(known):
        curve = {int(layer): own[name] for layer, own in found.items() if name in own}
        look = {"dashes": (4, 3)} if number else {}
        color = light(CYCLE[number % len(CYCLE)])
        axis.plot(
            list(curve), list(curve.values()), "o-", color=color, markersize=3.5, label=name, **look
        )
    axis.set_ylim(0, 1.1 * axis.dataLim.y1)
    axis.set(xlabel=_BY_LAYER, ylabel="squared error / output's square")
    _whole_layers(axis)
    legend(figure)
    return canvas.picture(
        figure,
        "How good is the choice?",
        "Error of a layer's output with the chosen experts alone; less is better. Dashed: "
        "controls.",
    )


def _whole_layers(axis) -> None:
    axis.xaxis.set_major_locator(integer_ticks(13))
