"""A plan as a person reads it in the terminal."""

from collections.abc import Callable, Iterable, Mapping

from rich import box
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dynmoe_jax.console import console
from dynmoe_jax.planning.plan import MOST_FLOPS, Plan
from dynmoe_jax.runs.formatting import compact, decimals, duration, percent


def print_plan(plan: Plan) -> None:
    """Prints everything that a plan says."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"
    parts = [_headline(plan, mesh), _memory(plan)]
    if plan.time and plan.flops:
        parts += [_flops(plan), _time(plan)]
        parts += [_traffic(plan)] * bool(plan.traffic) + [_operations(plan)] * bool(plan.operations)
    parts += _notes(plan)
    console.print()
    console.print(Rule(f"[bold]{escape(plan.topology)}, mesh {mesh}", style="cyan"))
    for part in parts:
        console.print()
        console.print(Padding(part, (0, 1), expand=False))
    console.print()


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="cyan",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _fill(
    table: Table, rows: Mapping[str, float], total: float, of: float, show: Callable[[float], str]
) -> None:
    """Rows of a name, a value and its share ``of`` something; then all of them together."""
    for name, value in rows.items():
        table.add_row(name, show(value), percent(value / of))
    table.add_section()
    table.add_row("all", show(total), percent(total / of), style="bold")


def _headline(plan: Plan, mesh: str) -> Table:
    memory = plan.memory
    room = f"{gigabytes(memory.total)} of {gigabytes(memory.limit)} on each device"
    fits = f"[bold green]yes[/], {room}" if memory.fits else f"[bold red]no[/], {room}"
    rows = [("Fits", fits)]
    if memory.remedy:
        rows.append(("To make it fit", escape(memory.remedy)))
    parts = f" in {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    rows.append(("A step", f"{plan.tokens:,} tokens{parts} on {plan.devices} devices"))
    if plan.experts_per_token:
        rows.append(("Experts per token", f"{plan.experts_per_token:g} (assumed)"))
    if plan.time:
        rows += [
            ("Step time", f"[bold]{seconds(plan.time.step)}[/]"),
            ("Utilisation", f"[bold]{percent(plan.utilisation)}[/] of the peak FLOP/s"),
            ("Speed", f"[bold]{decimals(plan.tokens_per_second, 0)}[/] tokens/s"),
            (
                "The run",
                f"{compact(plan.steps * plan.tokens)} tokens in {plan.steps:,} steps: "
                f"[bold]{plan.days:,.2f} days[/], [bold]{plan.chip_hours:,.0f} chip-hours[/]",
            ),
        ]
    if plan.compile_seconds:
        rows.append(("Compiled in", duration(plan.compile_seconds)))
    return _pairs(rows)


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = _table("Memory of one device", "kind", "bytes", "share of it")
    kinds = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "activations kept for backward": memory.activations,
        "temporaries: gradients, gathered parameters, work space": memory.temporaries,
        "batch, and what tiles add": memory.other,
    }
    _fill(table, kinds, memory.total, memory.limit, gigabytes)
    return table


def _flops(plan: Plan) -> Table:
    flops = plan.flops
    table = _table("FLOPs of one device in one step", "", "FLOPs", "of analytic")
    rows = {
        "analytic: the model, forward and backward": flops.analytic,
        "recomputed by backward": flops.recomputed,
    }
    if flops.compiled is not None:
        rows |= {
            "compiled, without what is recomputed": flops.compiled,
            "compiled, all": flops.compiled + flops.recomputed,
            "only if tokens use more experts: one more chunk of rows": flops.rest,
        }
    for name, value in rows.items():
        table.add_row(name, f"{compact(value)}FLOP", f"{value / flops.analytic:.2f}")
    return table


def _time(plan: Plan) -> Table:
    time = plan.time
    table = _table("Time of one step", "", "time", "share")
    rows = {
        "compute": time.compute,
        "  of it kernels, by their roofline": time.kernels,
        "collectives that nothing hides": time.exposed,
    }
    _fill(table, rows, time.step, time.step, seconds)
    table.add_row("collectives, hidden or not", seconds(time.collectives), "")
    return table


def _traffic(plan: Plan) -> Table:
    columns = ("mesh axis", "collective", "runs", "a device sends", "time on the links")
    table = _table("Between devices, in one step", *columns)
    for traffic in plan.traffic:
        table.add_row(
            traffic.axes,
            traffic.kind,
            f"{traffic.runs:,}",
            gigabytes(traffic.bytes),
            seconds(traffic.seconds),
        )
    return table


def _operations(plan: Plan) -> Table:
    table = _table("Dearest operations", "module", "operation", "runs", "cycles of one", "time")
    for operation in plan.operations:
        table.add_row(
            escape(operation.module or "(unnamed)"),
            escape(operation.what),
            f"{operation.times:,}",
            "roofline" if operation.cycles is None else f"{operation.cycles:,}",
            seconds(operation.total),
        )
    return table


def _notes(plan: Plan) -> list[Text]:
    notes = []
    if plan.flops and plan.flops.ratio:
        ratio = plan.flops.ratio
        good = ratio <= MOST_FLOPS
        text = f"Compiled FLOPs are {ratio:.2f} times the analytic ones, at most {MOST_FLOPS}: "
        notes.append(_check(text, good))
        dense = plan.flops.dense_over_experts
        text = "No product computes every expert for every row"
        notes.append(_check(text + (f" (but {', '.join(dense)}): " if dense else ": "), not dense))
    if plan.unknown:
        names = sorted({f"{o.what} ({o.module or 'unnamed'})" for o in plan.unknown})
        notes.append(Text("Not counted, because nobody estimates it: " + ", ".join(names) + "."))
    return notes + [Text(sentence, style="dim") for sentence in plan.assumptions]


def _check(text: str, good: bool) -> Text:
    return Text.assemble(text, ("yes", "green") if good else ("NO", "bold red"), ".")


def gigabytes(count: float) -> str:
    """``12345678901`` as ``12.3 GB``; megabytes and kilobytes below one."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= 0.9995 * scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def seconds(value: float) -> str:
    """``0.0123`` as ``12.3 ms``."""
    return f"{value:,.2f} s" if value >= 1 else f"{1e3 * value:,.1f} ms"
