"""The page of a study: one HTML file that needs nothing but itself, drawn from its record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax.evaluation.report.parts import escaped, figures_of, page, table_of
from dynmoe_jax.evaluation.report.theme import Canvas, figure_style
from dynmoe_jax.runs.formatting import compact, decimals, duration
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.study.questions import QUESTIONS
from dynmoe_jax.study.questions.question import SILENT

FILE_NAME = "study.html"

_INTERVALS = (
    "Intervals hold 95 %: chance of seeds by Student's t and chance of held-out documents by a "
    "bootstrap, added in quadrature; with one seed, of documents alone. An answer agrees with the "
    "paper where the whole interval is on the paper's side of zero, and disagrees where all of it "
    "is on the other. It is undecided otherwise, and where trainings are compared from one seed."
)


_AGREES = {"yes": "So it is here.", "no": "Not here.", "undecided": "Undecided here."}


def write_page(workdir: Path, record: Mapping[str, Any]) -> Path:
    """Writes ``study.html``; returns its path."""
    canvas = Canvas()
    with figure_style():
        sections = [part for each in record["questions"] for part in _section(each, record, canvas)]
    body = [
        "<h1>Do harder tasks need more experts?</h1>",
        _lead(record),
        _verdicts(record),
        f'<p class="soft">{escaped(_INTERVALS)}</p>',
        *sections,
        _runs(record),
    ]
    path = workdir / FILE_NAME
    write_atomically(path, page("Do harder tasks need more experts? A study", body))
    return path


def _lead(record: Mapping[str, Any]) -> str:
    seeds, runs, data = record["seeds"], record["runs"], record["data"]
    failed = "".join(
        f'<p class="warning">{escaped(name)} gives no result: {escaped(why)}</p>'
        for name, why in record["failed"].items()
    )
    return (
        f'<p class="lead">A study of size {escaped(record["size"])}: small forms of the models of '
        f"arXiv 2403.07652, each trained on {compact(data['tokens'])} tokens from "
        f"{seeds} seed{'s' * (seeds != 1)}, on {escaped(data['sources'])}; "
        f"{runs['complete']} runs, {duration(record['seconds'])} of training in all. Where they "
        f"differ from the paper's is at the end.</p>{failed}"
    )


def _verdicts(record: Mapping[str, Any]) -> str:
    """How many answers agree, of those that the paper has an answer to."""
    told = [answer for answer in record["answers"] if answer["paper"] != SILENT]
    counts = {
        word: sum(answer["agrees_with_paper"] == word for answer in told)
        for word in ("yes", "no", "undecided")
    }
    words = {"yes": "as in the paper", "no": "not as in the paper", "undecided": "undecided"}
    cards = "".join(
        f'<div class="card"><b>{counts[word]}</b><span>{escaped(words[word])}</span></div>'
        for word in counts
    )
    return f'<div class="cards">{cards}</div>'


def _section(part: Mapping[str, Any], record: Mapping[str, Any], canvas: Canvas) -> list[str]:
    number = part["number"]
    answers = [answer for answer in record["answers"] if answer["number"] == number]
    found = [f"<h2>{number}. {escaped(part['title'])}</h2>"]
    if part["note"]:
        found.append(f'<p class="soft">{escaped(part["note"])}</p>')
    if answers:
        found.append(f'<div class="grid">{"".join(map(_answer, answers))}</div>')
    else:
        found.append('<p class="soft">The runs that would answer it are not there.</p>')
    for table in part["tables"]:
        numbers = range(1, len(table["header"]))
        found.append(f'<p class="soft">{escaped(table["title"])}.</p>')
        found.append(table_of(table["header"], table["rows"], numbers))
    found.append(figures_of(QUESTIONS[number].pictures(part["data"], canvas)))
    return found


def _answer(answer: Mapping[str, Any]) -> str:
    """One answer: what is asked, what was found, and what the paper says."""
    paper = answer["paper"]
    if paper != SILENT:
        paper = f"The paper: {paper} {_AGREES[answer['agrees_with_paper']]}"
    return (
        f'<div class="card"><h3>{escaped(answer["question"])}</h3>'
        f"<p>{escaped(answer['sentence'])}</p><span>{escaped(paper)}</span></div>"
    )


def _runs(record: Mapping[str, Any]) -> str:
    header = ["run", "seed", "steps", "rate", "bits per byte", "experts", "FLOPs", "seconds"]
    rows = [
        [
            run["title"],
            run["seed"],
            run["steps"],
            f"{run['learning_rate']:g}",
            decimals(run["heldout_bits_per_byte"], 4),
            decimals(run["experts_per_token_at_inference"], 2),
            f"{run['flops']:.2e}",
            decimals(run["seconds"], 0),
        ]
        for run in record["models"]
    ]
    machine = record["machine"]
    said = f"{record['command']} — {machine['platform']}, Python {machine['python']}, "
    said += f"JAX {machine['jax']}"
    unlike = ""
    if record["settings"]:
        header_of = ["setting", "here", "in the paper"]
        unlike = f"<h2>Unlike the paper</h2>{table_of(header_of, record['settings'])}"
    return (
        f"{unlike}<h2>All runs</h2>{table_of(header, rows, range(1, len(header)))}"
        f'<p class="soft"><code>{escaped(said)}</code></p>'
    )
