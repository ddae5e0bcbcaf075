"""Page and table of an ensemble's evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.evaluation.ensemble.results import SURE
from dynmoe_jax.evaluation.report.parts import escaped, figures_of, page, table_of
from dynmoe_jax.evaluation.report.theme import CYCLE, Canvas, Picture, figure_style, legend, light
from dynmoe_jax.runs.formatting import MISSING, compact, decimals, percent, printable
from dynmoe_jax.runs.records import write_atomically

FILE_NAME = "ensemble.html"
_LINES = ("-", "--", ":", "-.")
_MOST_LINES = len(CYCLE) * len(_LINES)


def write_page(folder: Path, title: str, record: Mapping[str, Any]) -> Path:
    """Writes ``ensemble.html``; returns its path."""
    canvas = Canvas()
    with figure_style():
        pictures = [_against_tokens(record, canvas)]
    body = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="lead">{escaped(_lead(record))}</p>',
        "<h2>Bits per byte</h2>",
        _bits(record),
        "<h2>Posterior</h2>",
        _posteriors(record),
        figures_of(pictures),
        f'<p class="soft">{escaped(_prior(record))}</p>',
    ]
    path = folder / FILE_NAME
    write_atomically(path, page(title, body))
    return path


def print_results(record: Mapping[str, Any]) -> None:
    """A row for each domain: its best member, the ensemble, and how soon that is certain."""
    table = titled_table("Ensemble")
    table.add_column("domain", overflow="fold", min_width=8)
    table.add_column("best member", overflow="fold", min_width=8)
    for name in ("its bits/\nbyte", "ensemble's", "its mean\nposterior", "tokens until\nsure"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, domain in record["domains"].items():
        best = best_member(domain)
        table.add_row(
            escape(printable(name)),
            escape(printable(record["members"][best])),
            decimals(domain["bits_per_byte_by_member"][best], 4),
            decimals(domain["bits_per_byte"], 4),
            percent(domain["posterior"][best]),
            decimals(domain["tokens_until_sure"], 0),
        )
    total = record["all"]
    best = best_member(total)
    table.add_section()
    bits = decimals(total["bits_per_byte_by_member"][best], 4)
    member = escape(printable(record["members"][best]))
    table.add_row("all", member, bits, decimals(total["bits_per_byte"], 4), "", "", style="bold")
    console.print()
    console.print(table)


def best_member(domain: Mapping[str, Any]) -> int:
    """Number of the member with the least loss."""
    return int(np.argmin(domain["bits_per_byte_by_member"]))


def _lead(record: Mapping[str, Any]) -> str:
    kept = f", of which {record['top_k']} at a time have weight" if record["top_k"] else ""
    return (
        f"{len(record['members'])} members{kept}, {compact(record['parameters'])} parameters and "
        f"{compact(record['flops_per_token'])} FLOPs a token in all; "
        f"{record['all']['tokens']:,} held-out tokens of {record['all']['documents']:,} documents, "
        "as models read them: the rest of one that a row cuts counts anew."
    )


def _bits(record: Mapping[str, Any]) -> str:
    names = record["members"]
    header = ["domain", "tokens", *names, "ensemble", "nats/token", "at most"]

    def cells(name: str, part: Mapping[str, Any]) -> list[str]:
        bits = [decimals(each, 4) for each in part["bits_per_byte_by_member"]]
        bound = part.get("loss_bound")
        return [
            name,
            f"{part['tokens']:,}",
            *bits,
            decimals(part["bits_per_byte"], 4),
            decimals(part["loss"], 3),
            MISSING if bound is None else decimals(bound, 3),
        ]

    rows = [cells(name, domain) for name, domain in record["domains"].items()]
    total = cells("all", record["all"])
    return table_of(header, rows, range(1, len(header)), total) + (
        '<p class="soft">At most: the loss of the best member and the logarithm of its prior, paid '
        "once a document, which no ensemble of all members exceeds.</p>"
    )


def _posteriors(record: Mapping[str, Any]) -> str:
    header = ["domain", *record["members"], f"tokens until one has {percent(SURE, 0)}"]
    rows = [
        [name, *map(percent, domain["posterior"]), decimals(domain["tokens_until_sure"], 0)]
        for name, domain in record["domains"].items()
    ]
    return table_of(header, rows, range(1, len(header)))


def _against_tokens(record: Mapping[str, Any], canvas: Canvas) -> Picture | None:
    """The mean posterior of each domain's best member, against the tokens read."""
    domains = dict(list(record["domains"].items())[:_MOST_LINES])
    figure, (axis,) = canvas.figure(height=3.1 + 0.08 * len(domains))
    for number, (name, domain) in enumerate(domains.items()):
        best, points = best_member(domain), domain["posterior_by_position"]
        x = [1 + point["position"] for point in points]
        y = [point["posterior"][best] for point in points]
        line = _LINES[number // len(CYCLE)]
        color = light(CYCLE[number % len(CYCLE)])
        axis.plot(x, y, line, color=color, marker=".", label=name)
    axis.axhline(SURE, color=light("soft"), linewidth=0.8, linestyle=":")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="token of the document", ylabel="posterior")
    legend(figure)
    said = "Mean over documents of the posterior of the member that predicts the domain best."
    left_out = len(record["domains"]) - len(domains)
    said += f" {left_out} more domains are in ensemble.json." if left_out else ""
    return canvas.picture(figure, "How soon is the domain known?", said)


def _prior(record: Mapping[str, Any]) -> str:
    if record["prior_from"] != "estimate":
        return f"Prior: {_shares(record['members'], record['prior'])}."
    return "; ".join(
        f"prior of {name}, from {domain['documents_of_prior']} documents that are not evaluated: "
        f"{_shares(record['members'], domain['prior'])}"
        for name, domain in record["domains"].items()
    )


def _shares(names: Sequence[str], share_J: Sequence[float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in zip(names, share_J, strict=True))
