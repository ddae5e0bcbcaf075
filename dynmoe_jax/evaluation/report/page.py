"""The report of a run: one HTML page that needs nothing but itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_jax.config import Config, differences, walk
from dynmoe_jax.evaluation.report.figures import training_pictures
from dynmoe_jax.evaluation.report.parts import coloured, escaped, page, section, table_of
from dynmoe_jax.evaluation.report.routing_figures import routing_pictures
from dynmoe_jax.evaluation.report.series import History
from dynmoe_jax.evaluation.report.theme import Canvas, figure_style
from dynmoe_jax.evaluation.routing.page import analysis_parts
from dynmoe_jax.runs.formatting import compact, decimals, duration, percent
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.runs.summary import Sample, Summary

FILE_NAME = "report.html"

_COUNTS = "Experts per token"
# Heading, names of the section's pictures.
_SECTIONS = (
    ("Learning", ("loss", "auxiliary", "domains")),
    (_COUNTS, ("experts", "experts_by_layer", "layers", "histogram")),
    ("Load of the experts", ("load", "imbalance")),
    ("Routers", ("states",)),
    ("Optimiser and speed", ("optimizer", "speed")),
)


def write_report(
    workdir: Path,
    config: Config,
    metrics: list[dict[str, Any]],
    summary: Summary,
    routing: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``report.html`` into ``workdir``.

    Args:
      workdir: the run's folder.
      config: the run's settings.
      metrics: the lines of metrics.jsonl, as :func:`~dynmoe_jax.runs.metrics_file.read_metrics`
        gives them; any of them may lack names or hold NaN.
      summary: the run's results.
      routing: analysis of the held-out text, see :mod:`dynmoe_jax.evaluation.routing.record`.

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
        f"<h1>{escaped(name)}</h1>",
        _lead(config, summary),
        _warnings(history, summary),
        _cards(summary),
        f'<p class="soft">{escaped(fixed)}</p>' if fixed else "",
        *(section(title, [pictures.get(p) for p in names]) for title, names in _SECTIONS),
        *(analysis_parts(routing, canvas) if routing else ()),
        _domains(summary),
        _sample(summary.sample),
        "".join(f'<p class="soft">{escaped(reason)}</p>' for reason in summary.reasons()),
        _time(summary),
        _settings(config),
    ]
    path = workdir / FILE_NAME
    write_atomically(path, page(f"{name} – training report", body))
    return path


def _lead(config: Config, summary: Summary) -> str:
    model, layers = config.model, config.model.moe_settings
    kind = "dense feed-forwards"
    if layers:
        counts = {moe.num_experts for moe in layers}
        experts = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        rules = " or ".join(router.describe() for router in model.routers)
        kind = f"{experts} experts per MoE layer, {rules} routing"
    done = f"{summary.step:,} of {summary.steps:,} steps" if not summary.complete else "complete"
    return (
        f'<p class="lead">{model.num_layers} layers of width {model.width}, {escaped(kind)}. '
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
    return "".join(f'<p class="warning">{escaped(line)}</p>' for line in found)


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
        of = f"experts per token, of {heldout.experts}"
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
        f'<div class="card"><b>{escaped(a)}</b><span>{escaped(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{shown}</div>'


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
    table = table_of(header[:columns], shown, range(1, 5), total)
    return f"<h2>Held-out text by domain</h2>{table}"


def _sample(sample: Sample | None) -> str:
    if sample is None:
        return ""
    text, key = coloured(sample.pieces or [(sample.text, math.nan)])
    return (
        "<h2>Sample</h2><p class='soft'>The prompt in bold, then what the model wrote.</p>"
        f'{key}<div class="panel sample"><b>{escaped(sample.prompt)}</b>{text}</div>'
    )


def _time(summary: Summary) -> str:
    rows = [
        [name, decimals(seconds, 1), percent(summary.share(seconds))]
        for name, seconds in summary.activities().items()
    ]
    total = ["total", decimals(summary.total_seconds, 1), duration(summary.total_seconds)]
    table = table_of(["", "seconds", "share"], rows, (1, 2), total)
    return f"<h2>Where the time went</h2>{table}"


def _settings(config: Config) -> str:
    helps = {path: field.metadata["help"] for path, field, _ in walk(config)}
    changed = [[f"config.{p}", v, default, helps[p]] for p, v, default in differences(config)]
    everything = [[f"config.{p}", v, helps[p]] for p, _, v in walk(config)]
    table = table_of(["setting", "value", "default", "meaning"], changed)
    full = table_of(["setting", "value", "meaning"], everything)
    return (
        "<h2>Settings</h2><p class='soft'>What differs from the defaults.</p>"
        f"{table if changed else '<p>Nothing.</p>'}"
        f"<details><summary>All settings</summary>{full}</details>"
    )
