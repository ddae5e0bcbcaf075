"""The paper's two tables beside a model's own numbers, for a terminal."""

import math
from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.evaluation import paper
from dynmoe_jax.evaluation.report.task_results import TaskResult
from dynmoe_jax.runs.formatting import MISSING, decimals, printable


def print_tables(results: Mapping[str, TaskResult]) -> None:
    """Prints accuracy and, for a model with experts, experts per token."""
    console.print()
    console.print(accuracy_table(results))
    if any(result.experts.tokens for result in results.values()):
        console.print(experts_table(results))


def accuracy_table(results: Mapping[str, TaskResult]) -> Table:
    """Percent; the paper's models at the right."""
    table = titled_table("Accuracy [%], and the paper's (arXiv 2403.07652)")
    table.add_column("task", no_wrap=True)
    table.padding = (0, 1, 0, 0)  # nine columns of numbers, in a terminal of 80 letters
    models = (name.replace(" ", "\n") for name in paper.MODELS)
    for name in ("this\nmodel", "±", "by\nlength", *models):
        table.add_column(name, justify="right", no_wrap=True)
    for task, result in results.items():
        row = paper.TASKS.get(task)
        theirs = [decimals(row.accuracy[m], 1) if row else MISSING for m in paper.MODELS]
        table.add_row(label(task), *percents(result), *theirs)
    if paper.TASKS.keys() <= results.keys():
        ours = mean([100 * results[task].value for task in paper.TASKS])
        theirs = [decimals(paper.MEAN.accuracy[m], 1) for m in paper.MODELS]
        table.add_section()
        table.add_row("Mean", decimals(ours, 1), "", "", *theirs, style="bold")
    return table


def experts_table(results: Mapping[str, TaskResult]) -> Table:
    """Mean experts per token and MoE layer, and the layers that use fewest and most."""
    table = titled_table("Experts per token, and the paper's")
    table.add_column("task", no_wrap=True)
    for name in ("tokens", "this\nmodel", "the\npaper", "fewest,\nin layer", "most,\nin layer"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, result in results.items():
        row, use = paper.TASKS.get(task), result.experts
        theirs = decimals(row.experts, 2) if row else MISSING
        table.add_row(
            label(task),
            f"{use.tokens:,}",
            decimals(use.mean, 2),
            theirs,
            _layer(use.by_layer, min),
            _layer(use.by_layer, max),
        )
    if paper.TASKS.keys() <= results.keys():
        ours = mean([results[task].experts.mean for task in paper.TASKS])
        table.add_section()
        theirs = decimals(paper.MEAN.experts, 2)
        table.add_row("Mean", "", decimals(ours, 2), theirs, "", "", style="bold")
    return table


def label(task: str) -> str:
    """A task's name as the paper writes it, or its own."""
    return paper.TASKS[task].name if task in paper.TASKS else escape(printable(task))


def mean(values: list[float]) -> float:
    """NaN where a value is."""
    return sum(values) / len(values) if values else math.nan


def percents(result: TaskResult) -> tuple[str, str, str]:
    """Formats the figure that a task is judged by, its standard error, and accuracy by length.

    Percent, but for a metric that is none.
    """
    by_length = decimals(100 * result.normalized, 1)
    if result.metric not in ("acc", "exact_match"):
        value = f"{decimals(result.value, 3)} ({result.metric})"
        return value, decimals(result.stderr, 3), by_length
    return decimals(100 * result.value, 1), decimals(100 * result.stderr, 1), by_length


def _layer(by_layer: list[float], choose) -> str:
    if not by_layer:
        return MISSING
    layer = choose(range(len(by_layer)), key=by_layer.__getitem__)
    return f"{decimals(by_layer[layer], 2)} in {layer}"
