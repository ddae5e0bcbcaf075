"""The ranking of a search in the terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from dynmoe_jax.console import console
from dynmoe_jax.planning.plan import Plan
from dynmoe_jax.planning.report import gigabytes, seconds
from dynmoe_jax.planning.search import Search, mesh_name
from dynmoe_jax.runs.formatting import decimals, percent


def print_search(search: Search) -> None:
    """Prints the meshes that fit by step time, those that do not, and those that were not tried."""
    console.print()
    table = Table(
        title=f"Meshes of {escape(search.topology)}, fastest first",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="cyan",
    )
    columns = ("mesh", "parts", "step", "waits", "memory", "utilisation", "tokens/s", "chip-hours")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for plan in search.ranked:
        table.add_row(*_cells(plan))
    console.print(table)
    if search.ranked:
        console.print(f"Best: {flags_of(search.ranked[0])}", markup=False, soft_wrap=True)
    for plan in search.too_large:
        room = f"{gigabytes(plan.memory.total)} of {gigabytes(plan.memory.limit)}"
        line = f"Does not fit: {mesh_name(plan.mesh)} ({room}): {plan.memory.remedy}."
        console.print(line, markup=False, soft_wrap=True)
    for name, reason in search.refused.items():
        console.print(f"Not tried: {name}: {reason}", markup=False, soft_wrap=True, style="dim")
    console.print()


def flags_of(plan: Plan) -> str:
    """The settings that choose a plan's mesh."""
    sizes = " ".join(f"--config.mesh.{axis}={size}" for axis, size in plan.mesh.items())
    return f"{sizes} --config.train.microbatches={plan.microbatches}"


def _cells(plan: Plan) -> tuple[str, ...]:
    return (
        mesh_name(plan.mesh),
        str(plan.microbatches),
        seconds(plan.time.step),
        percent(plan.time.exposed / plan.time.step),
        percent(plan.memory.total / plan.memory.limit),
        percent(plan.utilisation),
        decimals(plan.tokens_per_second, 0),
        decimals(plan.chip_hours, 0),
    )
