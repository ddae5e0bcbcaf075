"""The page of a recipe: one HTML file over all its steps, drawn from its record."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax.evaluation.report.parts import escaped, figures_of, page, table_of
from dynmoe_jax.evaluation.report.theme import CYCLE, Canvas, Picture, figure_style, legend, light
from dynmoe_jax.runs.formatting import MISSING, compact, decimals, duration
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.surgery.recipes.step import STEPS_FOLDER

FILE_NAME = "recipe.html"
_LINES, _MARKERS, _HATCHES = ("-", "--", ":", "-."), ("o", "s", "^", "D"), ("", "///", "...", "xxx")
"""Looks of lines, points and bars: the next ones each time that all colours are used."""

_MOST_BARS = 60
_COLUMNS = ("bits per byte", "experts per token", "parameters", "active", "FLOPs",
            "with what it needs", "MB", "time")  # fmt: skip


def write_page(workdir: Path, record: Mapping[str, Any]) -> Path:
    """Writes ``recipe.html``; returns its path."""
    canvas = Canvas()
    with figure_style():
        pictures = [
            _against_flops(record, canvas),
            _by_effort(record, canvas),
            _by_domain(record, canvas),
        ]
    body = [
        f"<h1>{escaped(record['title'])}</h1>",
        f'<p class="lead">{escaped(_lead(record))}</p>',
        _comparisons(record),
        figures_of(pictures),
        _responses(record),
        _steps(record),
        _samples(record["steps"]),
        _how(record),
    ]
    path = workdir / FILE_NAME
    write_atomically(path, page(record["title"], body))
    return path


def _of_first_seed(step: Mapping[str, Any]) -> bool:
    """Whether a step is of the first seed."""
    return step["seed"].partition(",")[0] in ("", "0")


def _looks(record: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """(colour, number of the look) of each step that is drawn, the same in every picture."""
    drawn = (s for s in record["steps"] if (s["curve"] or s["by_domain"]) and _of_first_seed(s))
    names = [step["name"] for step in drawn]
    return {
        name: (light(CYCLE[i % len(CYCLE)]), i // len(CYCLE) % len(_LINES))
        for i, name in enumerate(names)
    }


def _words(name: str) -> str:
    """The name of a step as words, which break where a screen is narrow."""
    return name.replace("_", " ")


def _lead(record: Mapping[str, Any]) -> str:
    seeds, steps = record["seeds"], record["steps"]
    return (
        f"{len(steps)} steps of size {record['size']}, {seeds} seed{'s' * (seeds != 1)}, "
        f"{duration(record['seconds']['steps'])} in all. FLOPs count everything that was trained "
        "on the way to a model, what it was made of too, each training once."
    )


def _comparisons(record: Mapping[str, Any]) -> str:
    """Sentences of the comparisons, over seeds, and of each sweep."""
    told = [each["sentence"] for each in record["comparisons"]]
    for step in record["steps"]:
        if step["efforts"] and step["note"]:
            seed = f", seed {step['seed']}" if step["seed"] else ""
            told.append(f"{_words(step['name'])}{seed}: {step['note']}.")
    said = "".join(f"<p>{escaped(each)}</p>" for each in told)
    return f"<h2>What came out</h2>{said}" if said else ""


def _against_flops(record: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    """Held-out bits per byte against FLOPs spent: a line for each training, of the first seed."""
    shown = [s for s in record["steps"] if s["curve"] and _of_first_seed(s)]
    if not shown:
        return None
    figure, (axis,) = canvas.figure(height=3.2 + 0.08 * len(shown))
    looks = _looks(record)
    for step in shown:
        x, y = zip(*step["curve"], strict=True)
        color, look = looks[step["name"]]
        marker = _MARKERS[look] if len(x) == 1 else "."
        axis.plot(
            x,
            y,
            color=color,
            linestyle=_LINES[look],
            marker=marker,
            markersize=4,
            label=_words(step["name"]),
        )
    axis.set(xlabel="FLOPs spent, all training counted", ylabel="held-out bits per byte")
    legend(figure)
    return canvas.picture(
        figure,
        "What does a FLOP buy?",
        "Each line begins at the model that it was made of; single points are operations and "
        "ensembles, which train nothing. Less is better. First seed.",
    )


def _by_effort(record: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    """Held-out bits per byte of each model that was swept against FLOPs per token, by rule."""
    shown = [s for s in record["steps"] if s["efforts"] and _of_first_seed(s)]
    if not shown:
        return None
    lines = [(step, name) for step in shown for name in step["efforts"]]
    figure, (axis,) = canvas.figure(height=3.2 + 0.08 * len(lines))
    for number, step in enumerate(shown):
        for rule, (name, points) in enumerate(step["efforts"].items()):
            x, y = zip(*sorted(points), strict=True)
            axis.plot(
                x,
                y,
                color=light(CYCLE[number % len(CYCLE)]),
                linestyle=_LINES[rule % len(_LINES)],
                marker=_MARKERS[rule % len(_MARKERS)],
                markersize=4,
                label=f"{_words(step['name'])}, {name}",
            )
    axis.set(xlabel="FLOPs of a forward pass per token", ylabel="held-out bits per byte")
    legend(figure)
    return canvas.picture(
        figure,
        "What does a token's FLOP buy?",
        "Each line is one model, whose tokens choose experts by one rule, at several values of a "
        "setting. Lower and further left is better. First seed.",
    )


def _by_domain(record: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    """Bits per byte by domain of the steps that are compared."""
    names = {name for each in record["comparisons"] for name in (each["model"], each["than"])}
    shown = [
        s for s in record["steps"] if s["name"] in names and s["by_domain"] and _of_first_seed(s)
    ]
    domains = sorted({domain for step in shown for domain in step["by_domain"]})
    if not shown or len(domains) < 2:
        return None
    left_out = len(domains) - max(2, _MOST_BARS // len(shown))
    domains = domains[: len(domains) - max(0, left_out)]
    figure, (axis,) = canvas.figure(height=1.2 + 0.22 * len(domains) * len(shown))
    height, looks = 0.8 / len(shown), _looks(record)
    for number, step in enumerate(shown):
        at = [i + height * (number - (len(shown) - 1) / 2) for i in range(len(domains))]
        bits = [step["by_domain"].get(domain, math.nan) for domain in domains]
        color, look = looks[step["name"]]
        style = {"color": color, "hatch": _HATCHES[look], "edgecolor": "white", "linewidth": 0}
        axis.barh(at, bits, 0.9 * height, label=_words(step["name"]), **style)
    axis.set_yticks(range(len(domains)), domains)
    axis.invert_yaxis()
    axis.set(xlabel="held-out bits per byte")
    legend(figure)
    said = "By domain; less is better. First seed."
    said += f" {left_out} more domains are in recipe.json." if left_out > 0 else ""
    return canvas.picture(figure, "Which text?", said)


def _responses(record: Mapping[str, Any]) -> str:
    """Share of responses matched exactly by each evaluation, over seeds, by task."""
    scores: dict[str, list[Mapping[str, float]]] = {}
    for step in record["steps"]:
        if step["exact"]:
            scores.setdefault(step["name"], []).append(step["exact"])
    if not scores:
        return ""
    tasks = list(dict.fromkeys(task for found in scores.values() for one in found for task in one))
    rows = [
        [_words(name), *(_percent([one[task] for one in found if task in one]) for task in tasks)]
        for name, found in scores.items()
    ]
    table = table_of(["evaluation", *map(_words, tasks)], rows, range(1, len(tasks) + 1))
    return f'<h2>Responses matched exactly</h2>{table}<p class="soft">Percent; mean over seeds.</p>'


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}" if shares else MISSING


def _steps(record: Mapping[str, Any]) -> str:
    """Table of the steps, each the mean over its seeds, and links to their pages."""
    names = {step["key"]: _words(step["name"]) for step in record["steps"]}
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for step in record["steps"]:
        by_name.setdefault(step["name"], []).append(step)
    rows = [_row(own, names) for own in by_name.values()]
    header = ["step", "", "of", *_COLUMNS]
    table = table_of(header, rows, range(3, len(header)))
    several = any(len(own) > 1 for own in by_name.values())
    said = f'<p class="soft">Means over {record["seeds"]} seeds.</p>' if several else ""
    return f"<h2>Steps</h2>{table}{said}{_links(record['steps'])}"


def _row(seeds: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """Row of the table of steps.

    Args:
      seeds: the step of every seed.
      names: of steps by key.
    """

    def mean(name: str) -> float:
        found = [step[name] for step in seeds if step[name] is not None]
        return sum(found) / len(found) if found else math.nan

    def count(name: str) -> str:
        value = mean(name)
        return compact(value) if value > 0 else MISSING

    first, seconds = seeds[0], mean("seconds")
    return [
        _words(first["name"]),
        first["kind"],
        ", ".join(names[key] for key in first["needs"]) or MISSING,
        decimals(mean("bits_per_byte"), 4),
        decimals(mean("experts_per_token"), 2),
        *map(count, ("parameters", "active_parameters", "flops", "all_flops")),
        f"{mean('bytes') / 1e6:,.1f}",
        duration(seconds) if math.isfinite(seconds) else MISSING,
    ]


def _links(steps: Sequence[Mapping[str, Any]]) -> str:
    """Links to the pages of steps that have one."""
    links = [
        f'<a href="{escaped("/".join((STEPS_FOLDER, step["folder"], step["page"])))}">'
        f"{escaped(_words(step['name']))}{' ' + escaped(step['seed']) if step['seed'] else ''}</a>"
        for step in steps
        if step["page"]
    ]
    return f'<p class="soft">Pages of single steps: {", ".join(links)}.</p>' if links else ""


def _samples(steps: Sequence[Mapping[str, Any]]) -> str:
    """Samples of what models write, the prompt in bold."""
    shown = "".join(
        f'<div><h3>{escaped(_words(step["name"]))}</h3><div class="panel sample">'
        f"<b>{escaped(step['sample'][0])}</b>{escaped(step['sample'][1])}</div></div>"
        for step in steps
        if step["sample"] and _of_first_seed(step)
    )
    return f'<h2>Samples</h2><div class="grid">{shown}</div>' if shown else ""


def _how(record: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f'<h2>The recipe</h2><pre class="panel sample">{escaped(record["about"])}</pre>'
        f'<p class="soft">{escaped(told)}</p>'
    )
