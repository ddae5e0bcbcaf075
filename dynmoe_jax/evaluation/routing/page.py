"""The page of an analysis of routing, and its part of a run's report."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.evaluation.report.parts import escaped, page, section, table_of
from dynmoe_jax.evaluation.report.theme import Canvas, figure_style
from dynmoe_jax.evaluation.routing.figures import fixed_count, routing_pictures
from dynmoe_jax.evaluation.routing.record import FILE_NAME as RECORD
from dynmoe_jax.runs.formatting import MISSING, decimals, percent
from dynmoe_jax.runs.records import to_json, write_atomically

FILE_NAME = "routing.html"
_SHOWN_TOKENS = 12


def write_analysis(folder: Path, title: str, record: Mapping[str, Any]) -> Path:
    """Writes ``routing.json`` and ``routing.html``; returns the path of the page."""
    write_atomically(folder / RECORD, to_json(record, indent=1) + "\n")
    path = folder / FILE_NAME
    body = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="lead">{record["tokens"]:,} held-out tokens of {record["documents"]:,} '
        "documents.</p>",
        *analysis_parts(record, Canvas()),
    ]
    write_atomically(path, page(title, body))
    return path


def analysis_parts(record: Mapping[str, Any], canvas: Canvas) -> Iterable[str]:
    """Headings, pictures and tables."""
    parts = [f'<p class="soft">{escaped(sentence)}</p>' for sentence in record["left_out"]]
    if fixed_count(record):
        mean = decimals(record["experts_per_token"]["all"]["mean"], 2)
        said = f"No token can choose how many experts it uses; it is {mean} of all."
        parts.append(f'<p class="soft">{escaped(said)}</p>')
    with figure_style():
        pictures = routing_pictures(record, canvas)
    parts += [section(title, found) for title, found in pictures.items()]
    if not fixed_count(record):
        parts.append(_tokens(record["experts_per_token"]["by_token"]))
    return parts


def print_analysis(record: Mapping[str, Any]) -> None:
    """The figures of a page that fit on a few lines."""
    table = titled_table("Routing")
    table.add_column("")
    table.add_column("95 % interval", justify="right")
    every = record["experts_per_token"]["all"]
    rows = [("experts per token", _with_interval(every["mean"], every))]
    for name, key in (("predicted", "of_predicted_token"), ("itself", "of_token_itself")):
        if found := record["correlation_with_surprise"].get(key):
            rows.append(
                (f"rank correlation of experts with surprise of the token {name}",
                 _with_interval(found["spearman"], found))
            )  # fmt: skip
    if layers := record["context_independence_by_layer"]:
        share = sum(layer["token"] for layer in layers) / len(layers)
        chance = sum(layer["shuffled"] for layer in layers) / len(layers)
        text = f"{decimals(share, 3)} (chance {decimals(chance, 3)})"
        rows.append(("context independence", text))
    for pair in record.get("agreement", []):
        shares = [part["mean"] for part in pair["by_layer"]]
        text = percent(sum(shares) / len(shares))
        rows.append((f"same first choice at step {pair['from']:,} and {pair['to']:,}", text))
    if record["dropped"]["dropped"]:
        rows.append(("choices dropped", percent(record["dropped"]["rate"])))
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _with_interval(value: float, part: Mapping[str, float]) -> str:
    return f"{decimals(value, 3)} ({decimals(part['low'], 3)} to {decimals(part['high'], 3)})"


def _tokens(tokens: Mapping[str, Any]) -> str:
    """The most frequent token ids, and those that use most and fewest experts."""
    columns = [
        ("most frequent", tokens["most_frequent"]),
        ("most experts", tokens["most_experts"]),
        ("fewest experts", tokens["fewest_experts"]),
    ]
    columns = [(title, found[:_SHOWN_TOKENS]) for title, found in columns if found]
    if not columns:
        return ""
    tables = "".join(
        f"<div>{table_of([title, 'experts', '95 %', 'times'], map(_cells, found), (1, 2, 3))}</div>"
        for title, found in columns
    )
    return (
        "<h2>Experts per token by token id</h2>"
        f"<p class='soft'>Mean over layers. Of those that occur {tokens['least_tokens']} times or "
        "more, the ones that use most and fewest experts. Token ids that have a place in the table "
        f"cover {percent(tokens['covered'])} of the tokens.</p>"
        f'<div class="grid">{tables}</div>'
    )


def _cells(token: Mapping[str, Any]) -> tuple[str, ...]:
    name = repr(token["text"]) if token["text"] else f"token {token['id']}"
    low, high = decimals(token["low"], 2), decimals(token["high"], 2)
    interval = f"{low} to {high}" if low != MISSING else MISSING
    return name, decimals(token["mean"], 2), interval, f"{token['tokens']:,}"
