"""Pictures of training over its steps: losses, experts per token, balance, optimiser, speed."""

import itertools
from collections.abc import Callable

import numpy as np

from dynmoe_jax.evaluation.report.series import History, smooth, thin
from dynmoe_jax.evaluation.report.theme import CYCLE, Canvas, Picture, integer_ticks, legend, light
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.runs.summary import Summary

# Up to here every layer can have a line of its own that the eye can follow.
_LAYERS_AS_LINES = 6
_LOSS_COLORS = ("purple", "orange", "green", "red", "sky", "blue")


def training_pictures(history: History, summary: Summary, canvas: Canvas) -> dict[str, Picture]:
    """The pictures that can be drawn from what was logged, by a short name, in reading order."""
    drawers: dict[str, Callable[[History, Summary, Canvas], Picture | None]] = {
        "loss": _loss,
        "auxiliary": _auxiliary,
        "experts": _experts,
        "experts_by_layer": _experts_by_layer,
        "imbalance": _imbalance,
        "states": _states,
        "domains": _domains,
        "optimizer": _optimizer,
        "speed": _speed,
    }
    drawn = {name: draw(history, summary, canvas) for name, draw in drawers.items()}
    return {name: picture for name, picture in drawn.items() if picture}


def _curve(
    axis, history: History, values: np.ndarray, color: str, label: str = "", noisy: bool = True
) -> None:
    """A series over the steps: its noise faintly, its trend strongly; dots if there are few."""
    steps, mean = thin(history.steps), thin(values)
    noisy = noisy and len(mean) > 40
    trend = smooth(mean, len(mean) // 30) if noisy else mean
    if noisy:
        axis.plot(steps, mean, color=light(color), alpha=0.3, linewidth=0.9)
    if len(mean) < len(values):
        band = thin(values, "min"), thin(values, "max")
        axis.fill_between(steps, *band, color=light(color), alpha=0.15, linewidth=0)
    marker = "o" if np.isfinite(mean).sum() <= 15 else None
    axis.plot(steps, trend, color=light(color), label=label, marker=marker, markersize=4)


def _level(axis, value: float, color: str, label: str) -> None:
    """A horizontal line for comparison, with its value in the legend."""
    if np.isfinite(value):
        style = {"color": light(color), "linewidth": 1.2, "linestyle": (0, (4, 3))}
        axis.axhline(value, label=f"{label} {decimals(value, 2)}", **style)


def _finish(axis, label: str, bottom: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_ylabel(label)
    low, high = axis.get_xlim()
    if high - low < 2:  # a single step
        axis.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axis.xaxis.set_major_locator(integer_ticks(6))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1e3:g}k" if step >= 1e4 else f"{step:.0f}")
    )
    if bottom:
        axis.set_xlabel("step")


def _loss(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    name = "lm_loss" if history.has("lm_loss") else "loss"
    if not history.has(name):
        return None
    figure, (axis,) = canvas.figure()
    _curve(axis, history, history.scalar(name), "blue", "training")
    _level(axis, summary.heldout.unigram_entropy, "orange", "unigram entropy")
    _level(axis, summary.heldout.loss, "green", "held-out")
    _finish(axis, "loss [nats/token]")
    legend(figure)
    return canvas.picture(
        figure,
        "Does it learn? Loss of the language model",
        "Healthy: a steep fall through the unigram entropy, which is what a model reaches that "
        "only knows how frequent each token is, then a slow decline. A held-out loss well above "
        "the end of the curve means that the model memorises.",
    )


def _stacked(history: History, canvas: Canvas, rows: dict[str, tuple[str, str]]) -> tuple | None:
    """One small axis per metric that has numbers: {name: (axis label, colour)}."""
    rows = {name: row for name, row in rows.items() if history.has(name)}
    if not rows:
        return None
    figure, axes = canvas.figure(len(rows), height=max(3.1, 1.15 * len(rows)))
    for axis, (name, (label, color)) in zip(axes, rows.items(), strict=True):
        _curve(axis, history, history.scalar(name), color, noisy=name != "learning_rate")
        _finish(axis, label, bottom=axis is axes[-1])
    figure.align_ylabels(axes)
    return figure, dict(zip(rows, axes, strict=True))


def _auxiliary(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    del summary
    rows = {}
    for (name, loss), color in zip(LOSSES.items(), itertools.cycle(_LOSS_COLORS), strict=False):
        rows[f"{name}_loss"] = (loss.label or name, color)
        rows[f"{name}_coefficient"] = (f"coefficient of {name}", color)
    stacked = _stacked(history, canvas, rows)
    if stacked is None:
        return None
    return canvas.picture(
        stacked[0],
        "Is the router under control? Auxiliary losses",
        "Healthy: the balance loss comes down to about the mean number of experts per token, which "
        "is its value for an even load. Falling entropy means that tokens prefer some experts "
        "clearly and so need fewer; if it reaches zero early, the router has collapsed.",
    )


def _experts(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    if not history.has("experts_per_token"):
        return None
    figure, (axis,) = canvas.figure()
    by_layer = history.layers("experts_per_token_by_layer")
    if by_layer.shape[1] > 1 and np.isfinite(by_layer).any():
        finite = np.where(np.isnan(by_layer).all(1)[:, None], 0, by_layer)
        low, high = thin(np.nanmin(finite, 1)), thin(np.nanmax(finite, 1))
        band = axis.fill_between(thin(history.steps), low, high, label="range over layers")
        band.set(color=light("sky"), alpha=0.22, linewidth=0)
    _curve(axis, history, history.scalar("experts_per_token"), "blue", "mean")
    _level(axis, summary.heldout.experts_per_token, "green", "held-out")
    _finish(axis, "experts per token")
    legend(figure)
    return canvas.picture(
        figure,
        "How many experts does a token use, as training goes on?",
        "Healthy: high at the start, when the router is undecided, then falling and settling as "
        "it learns. One expert everywhere would mean that the router has given up choosing.",
    )


def _experts_by_layer(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    del summary
    values = history.layers("experts_per_token_by_layer")
    if not np.isfinite(values).any() or values.shape[1] < 2:
        return None
    many = values.shape[1] > _LAYERS_AS_LINES
    figure, (axis,) = canvas.figure()
    if many:
        _heat_over_steps(figure, axis, history, values)
    else:
        for layer, color in zip(range(values.shape[1]), CYCLE, strict=False):
            _curve(axis, history, values[:, layer], color, f"layer {layer}")
        _finish(axis, "experts per token")
        legend(figure)
    return canvas.picture(
        figure,
        "Which layers need many experts, as training goes on?",
        ("Each row is a layer, colour is its experts per token. " if many else "")
        + "Healthy: layers drift apart smoothly, as each finds how many experts its tokens need. "
        "A sudden jump of one layer points to a router that has become unstable.",
    )


def _heat_over_steps(figure, axis, history: History, values: np.ndarray) -> None:
    steps = history.steps
    margin = 0.5 if len(steps) < 2 else 0.0
    extent = (steps[0] - margin, steps[-1] + margin, -0.5, values.shape[1] - 0.5)
    image = axis.imshow(
        thin(values).T,
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap="cividis",
        interpolation="none",
    )
    axis.grid(False)
    axis.yaxis.set_major_locator(integer_ticks(8))
    bar = figure.colorbar(image, ax=axis, label="experts per token", pad=0.02)
    bar.outline.set_visible(False)
    _finish(axis, "layer")


def _imbalance(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    del summary
    values = history.layers("load_imbalance_by_layer")
    kept = ~np.isnan(values).all(1)
    if not values.shape[1] or not kept.any():
        return None
    figure, (axis,) = canvas.figure()
    worst = np.full(len(values), np.nan)
    mean = worst.copy()
    worst[kept], mean[kept] = np.nanmax(values[kept], 1), np.nanmean(values[kept], 1)
    _curve(axis, history, worst, "red", "worst layer")
    _curve(axis, history, mean, "blue", "mean over layers")
    axis.set_ylim(bottom=1)
    _finish(axis, "busiest expert / mean expert")
    legend(figure)
    return canvas.picture(
        figure,
        "Is the work shared? Load of the busiest expert",
        "How many times the mean load the busiest expert of a layer carries; 1 is an even load. "
        "Healthy: below about 2 to 3 after the start. A steady climb means that experts die.",
    )


def _states(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    """Numbers of the routers' states: their mean over layers, and its range."""
    del summary
    names = history.by_layer("router_")
    if not names:
        return None
    figure, axes = canvas.figure(len(names), height=max(3.1, 1.15 * len(names)))
    for axis, name, color in zip(axes, names, itertools.cycle(_LOSS_COLORS), strict=False):
        values = history.layers(f"{name}_by_layer")
        known = np.where(np.isnan(values).all(1)[:, None], 0, values)
        low, high = thin(np.nanmin(known, 1)), thin(np.nanmax(known, 1))
        axis.fill_between(
            thin(history.steps), low, high, color=light(color), alpha=0.2, linewidth=0
        )
        _curve(axis, history, history.scalar(name), color)
        label = name.removeprefix("router_").replace("_", " ")
        _finish(axis, label, bottom=axis is axes[-1])
    figure.align_ylabels(axes)
    return canvas.picture(
        figure,
        "What have the routers come to? Their states",
        "Numbers that routers keep besides their parameters and change after each update: lines "
        "are means over layers, bands reach from the lowest layer to the highest. Healthy: they "
        "move at first and then settle.",
    )


def _domains(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    """Weights of domains that a rule moves."""
    del summary
    names = history.named("domain_weight_")
    if not names:
        return None
    figure, (axis,) = canvas.figure()
    for number, name in enumerate(names):
        color, label = CYCLE[number % len(CYCLE)], name.removeprefix("domain_weight_")
        _curve(axis, history, history.scalar(name), color, label, noisy=False)
    axis.set_ylim(bottom=0)
    _finish(axis, "share of the rows")
    legend(figure)
    return canvas.picture(
        figure,
        "Which text is read? Weights of the domains",
        "Moved after each evaluation toward domains whose held-out loss exceeds its reference. "
        "Healthy: they settle. One that goes on rising has a reference out of reach.",
    )


def _optimizer(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    del summary
    rows = {
        "learning_rate": ("learning rate", "green"),
        "grad_norm": ("gradient norm", "blue"),
    }
    stacked = _stacked(history, canvas, rows)
    if stacked is None:
        return None
    figure, axes = stacked
    if "learning_rate" in axes:
        axes["learning_rate"].set_ylim(bottom=0)
        axes["learning_rate"].ticklabel_format(axis="y", scilimits=(-3, 3))
    norms = history.scalar("grad_norm")
    if "grad_norm" in axes and np.nanmin(norms) > 0:
        _log_scale(axes["grad_norm"])
    return canvas.picture(
        figure,
        "Is the optimiser calm? Learning rate and gradient norm",
        "Healthy: the norm before clipping falls during warm-up and then stays in a band. Spikes "
        "that come ever more often announce divergence: lower the peak learning rate.",
    )


def _log_scale(axis) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _speed(history: History, summary: Summary, canvas: Canvas) -> Picture | None:
    if not history.has("tokens_per_second"):
        return None
    figure, (axis,) = canvas.figure()
    _curve(axis, history, history.scalar("tokens_per_second") / 1e3, "blue", "training")
    _level(axis, summary.tokens_per_second / 1e3, "green", "median")
    axis.set_ylim(bottom=0)
    _finish(axis, "speed [thousand tokens/s]")
    legend(figure)
    moe = summary.heldout.experts_per_token_by_layer
    rising = ", or rising while tokens come to use fewer experts" if moe else ""
    return canvas.picture(
        figure,
        "How fast is it?",
        f"Healthy: flat{rising}. Dips are pauses for data, checkpoints or evaluation.",
    )
