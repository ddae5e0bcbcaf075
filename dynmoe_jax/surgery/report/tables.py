"""Tables on the terminal: the operations, a plan, a result."""

import math
from pathlib import Path
from typing import Any

from dynmoe_jax.console import console, titled_table, warn
from dynmoe_jax.runs.formatting import compact
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.plan import Cost, cost_of
from dynmoe_jax.surgery.request import Job
from dynmoe_jax.surgery.size import Size, size_of


def operation_rows() -> list[list[str]]:
    """Rows of the table of operations, as :data:`OPERATION_COLUMNS` says."""
    return [
        [
            name,
            kind.exact,
            "yes" if kind.streamed else "no",
            ", ".join(sorted(kind.statistics)) or "–",
            kind.paper,
        ]
        for name, kind in OPERATIONS.items()
    ]


OPERATION_COLUMNS = ("operation", "keeps the function", "streamed", "statistics", "paper")


def show_operations() -> None:
    """Prints all operations."""
    table = titled_table("Operations")
    for column in OPERATION_COLUMNS:
        table.add_column(column)
    for row in operation_rows():
        table.add_row(*row)
    console.print(table)


def show_plan(job: Job) -> None:
    """Prints what a result will be, and what it will take."""
    before, after = size_of(job.parents[0].config), size_of(job.cfg, job.asked.options.dtype)
    _show_sizes("Plan", before, after, [])
    cost: Cost = cost_of(job)
    console.print(
        f"About {cost.seconds:,.0f} s and {cost.peak_bytes / 1e6:,.0f} MB of memory here, by "
        f"arithmetic; {cost.read_bytes / 1e6:,.0f} MB are read, {cost.written_bytes / 1e6:,.0f} MB "
        "written.",
        soft_wrap=True,
    )
    _tell(job.remarks)


def show_record(record: dict[str, Any], folder: Path) -> None:
    """Prints what was made."""
    sides = [record["before"], record["after"]]
    sizes = [Size(**{k: side[k] for k in Size.__dataclass_fields__}) for side in sides]
    rows = [
        ["held-out loss, nats a token", *(f"{side['heldout_loss']:.4f}" for side in sides)],
        ["bits per byte", *(f"{side['heldout_bits_per_byte']:.4f}" for side in sides)],
    ]
    if not all(math.isnan(side["experts_per_token"]) for side in sides):
        rows.append(["experts a token", *(_or_dash(side["experts_per_token"]) for side in sides)])
    _show_sizes(record["operation"], *sizes, rows)
    exact, compared = record["exact"], record["compared"]["all"]
    promised = (
        ""
        if exact["promised"] is None or math.isnan(exact["promised"])
        else (f" (promised: {exact['promised']:g})")
    )
    console.print(
        f"Largest difference of logits, as a share of the largest: {exact['measured']:.2g}"
        f"{promised}. KL {compared['kl']:.3g} nats a token; the most probable token is the same "
        f"for {compared['agreement']:.1%} of {compared['tokens']:,}.",
        soft_wrap=True,
    )
    if record.get("found"):
        _show_findings(record["found"])
        console.print(OPERATIONS[record["operation"]].found, soft_wrap=True)
    _tell(record["remarks"])
    console.print(f"Written to {folder}. Digest {record['digest'][:16]}…", soft_wrap=True)


def _show_sizes(title: str, before: Size, after: Size, more: list[list[str]]) -> None:
    table = titled_table(title)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, text, shown in (
        ("parameters", "parameters", compact),
        ("active_parameters", "active parameters of a token", compact),
        ("stored_bytes", "stored, MB", lambda x: f"{x / 1e6:,.1f}"),
        ("flops_per_token", "FLOPs a token, forward", compact),
        ("kv_bytes_per_token", "keys and values, bytes a token", lambda x: f"{x:,}"),
    ):
        table.add_row(text, shown(getattr(before, name)), shown(getattr(after, name)))
    for row in more:
        table.add_row(*row)
    console.print(table)


def _show_findings(found: dict[str, dict[str, float]]) -> None:
    """Prints numbers by layer."""
    table = titled_table("By layer")
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    for column in ("layer", *names):
        table.add_column(column, justify="right")
    for layer, own in found.items():
        table.add_row(str(layer), *(f"{own[n]:.4g}" if n in own else "–" for n in names))
    console.print(table)


def _tell(remarks: list[str]) -> None:
    for remark in remarks:
        warn(remark)


def _or_dash(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
