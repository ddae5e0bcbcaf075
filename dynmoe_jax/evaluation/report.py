"""The report of a run: one HTML page that needs nothing but itself."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_jax.config import Config, differences, walk
from dynmoe_jax.evaluation.report_figures import training_pictures
from dynmoe_jax.evaluation.report_routing_figures import routing_pictures
from dynmoe_jax.evaluation.report_series import History
from dynmoe_jax.evaluation.report_theme import HEAT, Canvas, Picture, figure_style, style_sheet
from dynmoe_jax.training.formatting import (
    compact,
    decimals,
    duration,
    percent,
    printable,
)
from dynmoe_jax.training.records import write_atomically
from dynmoe_jax.training.summary import Sample, Summary

FILE_NAME = "report.html"

_COUNTS = "Experts per token"
# Heading, names of the section's pictures.
_SECTIONS = (
    ("Learning", ("loss", "auxiliary")),
    (_COUNTS, ("experts", "experts_by_layer", "layers", "histogram")),
    ("Load of the experts", ("load", "imbalance")),
    ("Optimiser and speed", ("optimizer", "speed")),
)


def write_report(
    workdir: Path, config: Config, metrics: list[dict[str, Any]], summary: Summary
) -> Path:
    """Writes ``report.html`` into ``workdir``.

    Args:
      workdir: the run's folder.
      config: the run's settings.
      metrics: the lines of metrics.jsonl, as :func:`~dynmoe_jax.training.metrics.read_metrics`
        gives them; any of them may lack names or hold NaN.
      summary: the run's results.

    Returns:
      the path of the page.
    """
    history, canvas = History(metrics), Canvas()
    with figure_style():
        pictures = training_pictures(history, summary, canvas)
        pictures |= routing_pictures(summary.heldout, canvas)
    fixed = _fixed_count(history, summary)
    if fixed:
        pictures = {n: p for n, p in pictures.items() if n not in dict(_SECTIONS)[_COUNTS]}
    name = workdir.resolve().name
    body = [
        f"<h1>{_text(name)}</h1>",
        _lead(config, summary),
        _warnings(history, summary),
        _cards(summary),
        f'<p class="soft">{_text(fixed)}</p>' if fixed else "",
        *(_section(title, [pictures.get(p) for p in names]) for title, names in _SECTIONS),
        _domains(summary),
        _sample(summary.sample),
        _time(summary),
        _settings(config),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)} – training report</title>\n"
        f"<style>{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = workdir / FILE_NAME
    write_atomically(path, page)
    return path


def _text(text: object) -> str:
    """Text that is safe anywhere in the page."""
    return html.escape(printable(str(text)))


def _lead(config: Config, summary: Summary) -> str:
    model, moe = config.model, config.model.moe
    kind = "dense feed-forwards"
    if moe.every_n_layers:
        rule = {"top_p": f"top-p {moe.top_p:g}", "top_k": f"top-{moe.top_k}"}[moe.router]
        kind = f"{moe.num_experts} experts per MoE layer, {rule} routing"
    done = f"{summary.step:,} of {summary.steps:,} steps" if not summary.complete else "complete"
    return (
        f'<p class="lead">{model.num_layers} layers of width {model.width}, {_text(kind)}. '
        f"Training {done}{f' after {summary.steps:,} steps' if summary.complete else ''}.</p>"
    )


def _warnings(history: History, summary: Summary) -> str:
    found = []
    bad = sum(not math.isfinite(line.get("loss", 0.0)) for line in history.metrics)
    if bad:
        found.append(f"The loss was not finite at {bad} of {len(history.metrics)} logged steps.")
    dropped = history.scalar("rows_dropped")
    steps = int((dropped > 0).sum())
    if steps:
        found.append(f"Expert assignments were dropped at {steps} of {len(dropped)} logged steps.")
    if summary.heldout.loss > summary.heldout.unigram_entropy:
        found.append("The held-out loss is above the unigram entropy: little has been learnt yet.")
    return "".join(f'<p class="warning">{_text(line)}</p>' for line in found)


def _fixed_count(history: History, summary: Summary) -> str:
    """A sentence in place of pictures if no token ever had a choice (top-k); else empty."""
    histogram = summary.heldout.histogram_by_layer
    used = np.flatnonzero(np.any(histogram, axis=0)) if histogram else ()
    if len(used) != 1 or np.any(np.abs(history.scalar("experts_per_token") - used[0]) > 1e-3):
        return ""
    plural = "s" if used[0] != 1 else ""
    return (
        f"Every token used exactly {used[0]} expert{plural} in every layer, all through training."
    )


def _cards(summary: Summary) -> str:
    heldout = summary.heldout
    cards = [
        (
            decimals(heldout.loss, 3),
            f"held-out loss, nats/token (unigram entropy {decimals(heldout.unigram_entropy, 2)})",
        ),
        (decimals(heldout.bits_per_byte, 3), "held-out bits per byte"),
    ]
    if heldout.load_by_layer:
        of = f"experts per token, of {len(heldout.load_by_layer[0])}"
        cards.append((decimals(heldout.experts_per_token, 2), of))
    speed = "tokens per second"
    if math.isfinite(summary.mfu):
        speed += f", {percent(summary.mfu)} MFU"
    cards += [
        (
            compact(summary.active_parameters),
            f"parameters per token, of {compact(summary.parameters)}",
        ),
        (decimals(summary.tokens_per_second, 0), speed),
        (duration(summary.total_seconds), f"in all, {summary.step:,} steps"),
    ]
    shown = "".join(
        f'<div class="card"><b>{_text(a)}</b><span>{_text(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{shown}</div>'


def _section(title: str, pictures: Iterable[Picture | None]) -> str:
    figures = "".join(
        f"<figure><figcaption><b>{_text(picture.title)}</b></figcaption>"
        f'<div role="img" aria-label="{_text(picture.title)}">{picture.svg}</div>'
        f"<figcaption><span>{_text(picture.caption)}</span></figcaption></figure>"
        for picture in pictures
        if picture
    )
    return f'<h2>{_text(title)}</h2><div class="grid">{figures}</div>' if figures else ""


def _table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[int] = (),
    total: Sequence[object] = (),
) -> str:
    """A table; the columns in ``numbers`` are aligned right, a ``total`` closes it."""

    def row(cells: Sequence[object], tag: str) -> str:
        kinds = (' class="number"' if i in numbers else "" for i in range(len(cells)))
        return "".join(f"<{tag}{k}>{_text(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    body += f'<tr class="total">{row(total, "td")}</tr>' if total else ""
    head = f"<thead><tr>{row(header, 'th')}</tr></thead>"
    return f'<div class="panel scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _domains(summary: Summary) -> str:
    heldout = summary.heldout
    header = ["domain", "tokens", "nats per token", "bits per byte", "experts per token"]
    rows = [
        [name, d.tokens, d.loss, d.bits_per_byte, d.experts_per_token]
        for name, d in heldout.domains.items()
    ]
    tokens = sum(domain.tokens for domain in heldout.domains.values())
    rows.append(["all", tokens, heldout.loss, heldout.bits_per_byte, heldout.experts_per_token])
    columns = 5 if heldout.experts_per_token_by_layer else 4
    *shown, total = (
        [n, f"{t:,}", decimals(a, 3), decimals(b, 3), decimals(c, 2)][:columns]
        for n, t, a, b, c in rows
    )
    table = _table(header[:columns], shown, range(1, 5), total)
    return f"<h2>Held-out text by domain</h2>{table}"


def _sample(sample: Sample) -> str:
    text, key = _text(sample.text), ""
    counts = [experts for _, experts in sample.pieces if math.isfinite(experts)]
    if counts:
        low, high = min(counts), max(counts)
        text = "".join(_piece(piece, experts, low, high) for piece, experts in sample.pieces)
        shades = "".join(f'<i class="heat{step}">&nbsp;</i>' for step in range(len(HEAT)))
        key = (
            f'<p class="soft key">Colour: experts that a token used, mean over layers, from '
            f"{decimals(low, 1)} {shades} to {decimals(high, 1)}.</p>"
        )
    return (
        "<h2>Sample</h2><p class='soft'>The prompt in bold, then what the model wrote.</p>"
        f'{key}<div class="panel sample"><b>{_text(sample.prompt)}</b>{text}</div>'
    )


def _piece(text: str, experts: float, low: float, high: float) -> str:
    if not math.isfinite(experts):
        return _text(text)
    step = int((experts - low) / (high - low) * (len(HEAT) - 1) + 0.5) if high > low else 0
    return f'<i class="heat{step}" title="{decimals(experts, 2)} experts">{_text(text)}</i>'


def _time(summary: Summary) -> str:
    rows = [
        [name, decimals(seconds, 1), percent(summary.share(seconds))]
        for name, seconds in summary.activities().items()
    ]
    total = ["total", decimals(summary.total_seconds, 1), duration(summary.total_seconds)]
    table = _table(["", "seconds", "share"], rows, (1, 2), total)
    return f"<h2>Where the time went</h2>{table}"


def _settings(config: Config) -> str:
    helps = {path: field.metadata["help"] for path, field, _ in walk(config)}
    changed = [[f"config.{p}", v, default, helps[p]] for p, v, default in differences(config)]
    everything = [[f"config.{p}", v, helps[p]] for p, _, v in walk(config)]
    table = _table(["setting", "value", "default", "meaning"], changed)
    full = _table(["setting", "value", "meaning"], everything)
    return (
        "<h2>Settings</h2><p class='soft'>What differs from the defaults.</p>"
        f"{table if changed else '<p>Nothing.</p>'}"
        f"<details><summary>All settings</summary>{full}</details>"
    )
