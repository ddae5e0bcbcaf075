"""Pictures of the routing of held-out text: who used how many experts, and which ones.

Axis letters: N MoE layers, E experts, K the bound on experts per token.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dynmoe_jax.evaluation.report.theme import CYCLE, Canvas, Picture, integer_ticks, legend, light
from dynmoe_jax.runs.formatting import decimals, percent, printable
from dynmoe_jax.runs.summary import HeldOut

# One fewer than there are colours, so that thirty domains look different from each other.
_MARKERS = "osD^v"
_MAX_DOMAINS = 12
_MAX_NAME = 28


def routing_pictures(heldout: HeldOut, canvas: Canvas) -> dict[str, Picture]:
    """The pictures by a short name; none for a dense model."""
    if not heldout.experts_per_token_by_layer:
        return {}
    pictures = {"layers": _layers(heldout, canvas)}
    if heldout.load_by_layer:
        pictures["load"] = load_picture(heldout.load_by_layer, canvas)
    if heldout.histogram_by_layer:
        counts = np.nan_to_num(np.array(heldout.histogram_by_layer, dtype=float))
        if counts.sum() > 0:
            pictures["histogram"] = _histogram(counts, canvas)
    return pictures


def _layers(heldout: HeldOut, canvas: Canvas) -> Picture:
    means = heldout.experts_per_token_by_layer
    figure, (axis,) = canvas.figure(height=3.1 + 0.1 * max(len(heldout.domains) - 3, 0))
    layers = range(len(means))
    axis.bar(layers, means, width=0.72, color=light("line"), label="all text")
    largest = sorted(heldout.domains.items(), key=lambda item: -item[1].tokens)[:_MAX_DOMAINS]
    for index, (name, domain) in enumerate(largest):
        axis.plot(
            layers,
            domain.experts_per_token_by_layer,
            linestyle="none",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4 if len(means) <= 24 else 2.8,
            color=light(CYCLE[index % len(CYCLE)]),
            label=_short(name),
        )
    axis.xaxis.set_major_locator(integer_ticks(13))
    axis.grid(axis="x", visible=False)
    margin = 0.7 if len(means) > 1 else 0.9
    axis.set_xlim(-margin, len(means) - 1 + margin)
    axis.set(xlabel="MoE layer (0 is next to the embedding)", ylabel="experts per token")
    legend(figure)
    which = f"{len(largest)} largest " if len(largest) < len(heldout.domains) else ""
    return canvas.picture(
        figure,
        "Which layers, and which text, need more experts?",
        f"Bars are all held-out text, marks are its {which}domains. Healthy: layers differ, and "
        "harder text lies above easier text. Equal values everywhere mean that the number of "
        "experts carries no information.",
    )


def _short(name: str) -> str:
    name = printable(name).lstrip("_") or "?"  # an underscore would hide it from the legend
    if len(name) <= _MAX_NAME:
        return name
    half = _MAX_NAME // 2  # names of one family often differ only at the end
    return f"{name[: half - 1]}…{name[-half:]}"


def _side_by_side(load_by_layer: Sequence[Sequence[float]]) -> Float[np.ndarray, "N E"]:
    """The loads of all layers; NaN where one has fewer experts than the largest."""
    load_NE = np.full((len(load_by_layer), max(map(len, load_by_layer))), np.nan)
    for row, load in zip(load_NE, load_by_layer, strict=True):
        row[: len(load)] = load
    return load_NE


def load_picture(
    load_by_layer: Sequence[Sequence[float]],
    canvas: Canvas,
    title: str = "Which experts do the work?",
    names: Sequence[str] = (),
) -> Picture:
    """Heat map of the load of every expert.

    Args:
      load_by_layer: share of the tokens that chose each expert of each MoE layer.
      canvas: that draws it.
      title: of the picture.
      names: of the layers; without any, they are counted.
    """
    load_NE = _side_by_side(load_by_layer)
    known_NE = ~np.isnan(load_NE)
    experts_N1 = np.maximum(known_NE.sum(axis=1, keepdims=True), 1)
    even_N1 = np.nansum(load_NE, axis=1, keepdims=True) / experts_N1
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_NE = np.log2(load_NE / even_N1)
    finite = np.abs(ratio_NE[np.isfinite(ratio_NE)])
    # Whole powers of two, so that the legend has round numbers; a few outliers may saturate.
    typical = np.percentile(finite, 98) if finite.size else 0.0
    limit = float(np.clip(np.ceil(typical), 1, 3))
    figure, (axis,) = canvas.figure(height=float(np.clip(1.8 + 0.16 * len(load_NE), 2.2, 4.4)))
    image = axis.imshow(
        np.clip(ratio_NE, -limit, limit),
        cmap="PuOr_r",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="none",
    )
    unused = np.argwhere(load_NE == 0)
    if len(unused):
        axis.plot(unused[:, 1], unused[:, 0], "x", markersize=3.5, color="white")
    axis.grid(False)
    axis.xaxis.set_major_locator(integer_ticks(9))
    axis.yaxis.set_major_locator(integer_ticks(9))
    if names:
        every = -(-len(names) // 10)
        axis.set_yticks(range(0, len(names), every), names[::every])
    axis.set(xlabel="expert", ylabel="layer" if names else "MoE layer")
    ticks = np.arange(-limit, limit + 1)
    bar = figure.colorbar(image, ax=axis, ticks=ticks, pad=0.02, label="load / even share")
    bar.ax.set_yticklabels([_times(tick, limit) for tick in ticks])
    bar.outline.set_visible(False)
    experts = known_NE.sum()
    found = f"Never chosen (×): {len(unused)} of {experts} experts. " if len(unused) else ""
    return canvas.picture(
        figure,
        title,
        f"{found}White is an even share of the layer's tokens, orange is more, purple is less. "
        "Healthy: a patchwork of pale colours. Dark orange columns of a few experts beside dark "
        "purple ones mean that the balance loss is too weak.",
    )


def _times(power: float, limit: float) -> str:
    name = f"{2**power:g}×" if power >= 0 else f"1/{2**-power:g}×"
    bound = {limit: "≥ ", -limit: "≤ "}.get(power, "")
    return f"{bound}{name}" + (" (even)" if power == 0 else "")


def _histogram(counts: np.ndarray, canvas: Canvas) -> Picture:
    from matplotlib.ticker import PercentFormatter

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    overall = counts.sum(0) / counts.sum()
    # Bars that nobody can see would push those that matter together.
    drawn = np.flatnonzero(shares.max(0) > 5e-4)
    first, end = min(drawn[0], 1), drawn[-1] + 1
    numbers = np.arange(first, end)
    figure, (axis,) = canvas.figure()
    axis.bar(numbers, overall[first:end], width=0.78, color=light("sky"), label="all layers")
    if len(shares) > 1:
        for row, color, name in ((0, "orange", "first"), (-1, "purple", "last")):
            axis.plot(
                numbers,
                shares[row, first:end],
                color=light(color),
                linewidth=1.2,
                marker="o",
                markersize=3,
                label=f"{name} layer",
            )
    mean = float((overall * np.arange(len(overall))).sum())
    axis.axvline(
        mean,
        color=light("ink"),
        linewidth=1,
        linestyle=(0, (4, 3)),
        label=f"mean {decimals(mean, 2)}",
    )
    axis.xaxis.set_major_locator(integer_ticks(12))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if overall.max() > 0.05 else 1))
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="experts used by a token in a layer", ylabel="share of held-out tokens")
    legend(figure)
    return canvas.picture(
        figure,
        "How unequal are tokens?",
        "Healthy: most tokens need few experts and a tail of hard ones needs many. "
        f"{percent(overall[-1])} used the upper bound of {len(overall) - 1}.",
    )
