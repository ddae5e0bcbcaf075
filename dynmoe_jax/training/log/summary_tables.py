"""The closing table of a run, for a terminal of any width and for a plain log."""

import math
from collections.abc import Iterable
from pathlib import Path

from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.runs.formatting import MISSING, compact, decimals, duration, percent, printable
from dynmoe_jax.runs.summary import Summary

_LAYERS_IN_ONE_COLUMN = 12
_BAR_WIDTH = 16


def print_summary(summary: Summary, workdir: Path) -> None:
    """Prints the results of a run and where they were written."""
    done = f"{summary.step:,} of {summary.steps:,} steps"
    title = f"Training complete, {done}" if summary.complete else f"Stopped after {done}"
    parts = [_headline(summary), _domains(summary)]
    if summary.heldout.experts_per_token_by_layer:
        parts.append(_layers(summary))
    parts += [_seconds(summary), *_sample(summary)]
    console.print()
    console.print(Rule(f"[bold]{title}", style="cyan"))
    for part in parts:
        console.print()
        console.print(Padding(part, (0, 1), expand=False))
    console.print()
    _print_paths(summary, workdir)
    console.print()


def _pairs(rows: Iterable[tuple[str, Text | str]]) -> Table:
    """Names and values, no lines."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _headline(summary: Summary) -> Table:
    heldout = summary.heldout
    below = heldout.unigram_entropy - heldout.loss
    verdict = f"{abs(below):.2f} {'below' if below > 0 else '[bold red]above'}"
    verdict = verdict if math.isfinite(below) else MISSING
    rows = [
        ("Held-out loss", f"[bold]{decimals(heldout.loss, 3)}[/] nats/token"),
        (
            "Unigram entropy",
            f"{decimals(heldout.unigram_entropy, 3)} nats/token: the loss is {verdict}",
        ),
        ("Bits per byte", f"[bold]{decimals(heldout.bits_per_byte, 3)}[/]"),
    ]
    if heldout.load_by_layer:
        mean = decimals(heldout.experts_per_token, 2)
        rows.append(("Experts per token", f"[bold]{mean}[/] of {heldout.experts}"))
    active, total = summary.active_parameters, summary.parameters
    rows.append(("Parameters", f"{compact(total)}, of which {compact(active)} work on a token"))
    speed = f"[bold]{decimals(summary.tokens_per_second, 0)}[/] tokens/s"
    if math.isfinite(summary.mfu):
        speed += f", {percent(summary.mfu)} of the hardware's peak FLOP/s"
    return _pairs([*rows, ("Speed", speed)])


def _domains(summary: Summary) -> Table:
    heldout = summary.heldout
    moe = bool(heldout.experts_per_token_by_layer)
    table = titled_table("Held-out text")
    table.add_column("domain", overflow="fold")
    for name in ("tokens", "nats/token", "bits/byte") + ("experts/token",) * moe:
        table.add_column(name, justify="right", no_wrap=True)
    for name, domain in heldout.domains.items():
        figures = (domain.tokens, domain.loss, domain.bits_per_byte, domain.experts_per_token)
        table.add_row(escape(printable(name)), *_domain_cells(*figures)[: 3 + moe])
    tokens = sum(domain.tokens for domain in heldout.domains.values())
    figures = (tokens, heldout.loss, heldout.bits_per_byte, heldout.experts_per_token)
    table.add_section()
    table.add_row("all", *_domain_cells(*figures)[: 3 + moe], style="bold")
    return table


def _domain_cells(tokens: int, loss: float, bits: float, experts: float) -> tuple[str, ...]:
    return f"{tokens:,}", decimals(loss, 3), decimals(bits, 3), decimals(experts, 2)


def _layers(summary: Summary) -> Table:
    """Experts per token, a row per layer; a deep model is folded into columns side by side."""
    means = summary.heldout.experts_per_token_by_layer
    fitting = max(1, (console.width - 2) // (_BAR_WIDTH + 17))
    folds = min(fitting, math.ceil(len(means) / _LAYERS_IN_ONE_COLUMN))
    height = math.ceil(len(means) / folds)
    top = max((mean for mean in means if math.isfinite(mean)), default=0.0)
    table = titled_table("Experts per token, by MoE layer")
    for _ in range(folds):
        table.add_column("layer", justify="right")
        table.add_column("mean", justify="right")
        table.add_column("", no_wrap=True)
    for row in range(height):
        cells: list[str | Text] = []
        for layer in range(row, len(means), height):
            cells += [str(layer), decimals(means[layer], 2), _bar(means[layer], top)]
        table.add_row(*cells)
    return table


def _bar(value: float, top: float) -> Text:
    share = value / top if top > 0 and math.isfinite(value) else 0.0
    mark = "#" if console.options.ascii_only else "━"
    return Text(f"{mark * round(share * _BAR_WIDTH):<{_BAR_WIDTH}}", style="magenta")


def _seconds(summary: Summary) -> Table:
    table = titled_table("Time")
    table.add_column("activity")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in summary.activities().items():
        table.add_row(escape(name), decimals(seconds, 1), percent(summary.share(seconds)))
    total = summary.total_seconds
    table.add_section()
    table.add_row("total", decimals(total, 1), duration(total), style="bold")
    return table


def _sample(summary: Summary) -> list[Text]:
    sample = summary.sample
    if sample is None:
        return [Text(reason, style="yellow") for reason in summary.reasons()]
    text = Text(printable(sample.prompt), style="bold")
    text.append(printable(sample.text), style="not bold")
    return [Text("Sample", style="bold"), text]


def _print_paths(summary: Summary, workdir: Path) -> None:
    """Prints where everything is, a line each; a path is never broken, so that it can be copied."""
    width = max(map(len, summary.paths), default=0)
    for name, path in summary.paths.items():
        line = Text.assemble(" ", (f"{name:<{width}}", "cyan"), f"   {workdir / path}")
        console.print(line, soft_wrap=True)
