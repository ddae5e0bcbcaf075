"""The page of an evaluation: tables, pictures, and a text coloured by the experts that it used."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dynmoe_jax.data import Tokenizer
from dynmoe_jax.evaluation import paper
from dynmoe_jax.evaluation.expert_use import Example, ExpertUse
from dynmoe_jax.evaluation.report.parts import coloured, escaped, page, section, table_of
from dynmoe_jax.evaluation.report.task_results import TaskResult
from dynmoe_jax.evaluation.report.task_tables import percents
from dynmoe_jax.evaluation.report.theme import (
    CYCLE,
    Canvas,
    Picture,
    figure_style,
    integer_ticks,
    legend,
    light,
)
from dynmoe_jax.inference.pieces import Pieces
from dynmoe_jax.runs.formatting import MISSING, decimals
from dynmoe_jax.runs.records import write_atomically

FILE_NAME = "tasks.html"
_LINES = ("-", "--", ":")
_MOST_TASKS = len(CYCLE) * len(_LINES)
_SHOWN_TOKENS = 12
# Of fewer, the mean says more about the position than about the token.
_OFTEN = 20
_EXAMPLE_TOKENS = 400


def write_page(
    folder: Path,
    title: str,
    results: Mapping[str, TaskResult],
    experts: ExpertUse,
    tokenizer: Tokenizer,
) -> Path:
    """Writes ``tasks.html``.

    Args:
      folder: where.
      title: whose evaluation it is.
      results: by task.
      experts: of all requests.
      tokenizer: of the model.

    Returns:
      the path of the page.
    """
    moe = {task: result for task, result in results.items() if result.experts.tokens}
    canvas = Canvas()
    with figure_style():
        pictures = [_by_task(moe, canvas), _by_layer(moe, canvas)] if moe else []
    body = [
        f"<h1>{escaped(title)}</h1>",
        '<p class="lead">Tasks of lm-evaluation-harness; the numbers of the paper are of its '
        "models (arXiv 2403.07652), whose way of scoring it does not describe.</p>",
        _accuracy(results),
        section("Experts per token", pictures),
        _tokens(experts, tokenizer) if moe else "",
        *(
            _example(task, result.experts.example, experts, tokenizer)
            for task, result in moe.items()
        ),
    ]
    path = folder / FILE_NAME
    write_atomically(path, page(title, body))
    return path


def _accuracy(results: Mapping[str, TaskResult]) -> str:
    header = ["task", "items", "metric", "this model", "± standard error", "by length", "experts"]
    header += [f"paper: {model}" for model in paper.MODELS] + ["paper: experts"]
    rows = []
    for task, result in results.items():
        row = paper.TASKS.get(task)
        rows.append(
            [
                row.name if row else task,
                f"{result.items:,}",
                result.metric,
                *percents(result),
                decimals(result.experts.mean, 2),
                *(decimals(row.accuracy[m], 1) if row else MISSING for m in paper.MODELS),
                decimals(row.experts, 2) if row else MISSING,
            ]
        )
    table = table_of(header, rows, [1, *range(3, len(header))])
    return f"<h2>Tasks</h2><p class='soft'>Accuracies are percent.</p>{table}"


def _by_task(results: Mapping[str, TaskResult], canvas: Canvas) -> Picture:
    names = [paper.TASKS[task].name if task in paper.TASKS else task for task in results]
    figure, (axis,) = canvas.figure(height=1.4 + 0.34 * len(results))
    positions = np.arange(len(results))[::-1]
    means = [result.experts.mean for result in results.values()]
    axis.barh(positions, means, height=0.62, color=light("sky"), label="this model")
    known = [(y, paper.TASKS[task].experts) for y, task in zip(positions, results, strict=True)
             if task in paper.TASKS]  # fmt: skip
    if known:
        ys, theirs = zip(*known, strict=True)
        axis.plot(theirs, ys, "D", color=light("orange"), markersize=4, label="the paper's model")
    axis.set_yticks(positions, names, parse_math=False)
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="experts per token, mean over tokens and MoE layers")
    legend(figure)
    return canvas.picture(
        figure,
        "Which tasks need more experts?",
        "The paper's finding: tasks that want reasoning (BBH) use more experts than those that "
        "want common sense.",
    )


def _by_layer(results: Mapping[str, TaskResult], canvas: Canvas) -> Picture:
    figure, (axis,) = canvas.figure(height=3.1 + 0.1 * max(len(results) - 3, 0))
    shown = list(results.items())[:_MOST_TASKS]
    for i, (task, result) in enumerate(shown):
        by_layer = result.experts.by_layer
        axis.plot(
            range(len(by_layer)),
            by_layer,
            color=light(CYCLE[i % len(CYCLE)]),
            linestyle=_LINES[i // len(CYCLE)],
            marker="o",
            markersize=3,
            label=paper.TASKS[task].name if task in paper.TASKS else task.lstrip("_"),
        )
    axis.xaxis.set_major_locator(integer_ticks(13))
    axis.set(xlabel="MoE layer (0 is next to the embedding)", ylabel="experts per token")
    legend(figure)
    more = len(results) - len(shown)
    return canvas.picture(
        figure,
        "In which layers?",
        "Healthy: layers differ, and so do tasks. In the paper the lowest layers use most experts."
        + (f" {more} more tasks are in results.json." if more else ""),
    )


def _tokens(experts: ExpertUse, tokenizer: Tokenizer) -> str:
    """The tokens that use most and fewest experts, side by side."""
    ranked = experts.by_token(_OFTEN)
    if len(ranked) < 2:
        return ""
    shown = min(_SHOWN_TOKENS, len(ranked) // 2)
    most, fewest = ranked[:shown], ranked[-shown:][::-1]
    rows = [
        [*_token_cells(one, tokenizer), *_token_cells(other, tokenizer)]
        for one, other in zip(most, fewest, strict=True)
    ]
    header = ["most", "experts", "times", "fewest", "experts", "times"]
    return (
        f"<h2>Tokens</h2><p class='soft'>Of those that occur {_OFTEN} times or more, the ones that "
        f"use most and fewest experts.</p>{table_of(header, rows, (1, 2, 4, 5))}"
    )


def _token_cells(ranked: tuple[int, float, int], tokenizer: Tokenizer) -> tuple[str, ...]:
    token, mean, count = ranked
    names = {tokenizer.eos_id: "end of a document", tokenizer.bos_id: "begin of a document"}
    text = tokenizer.decode([token])
    shown = repr(text) if text else names.get(token, f"token {token}")
    return shown, decimals(mean, 2), f"{count:,}"


def _example(task: str, example: Example | None, experts: ExpertUse, tokenizer: Tokenizer) -> str:
    if example is None:
        return ""
    name = paper.TASKS[task].name if task in paper.TASKS else task
    used = example.experts_L[-_EXAMPLE_TOKENS:] / max(1, experts.layers)
    tokens = np.array(example.tokens[-len(used) :])
    pieces = Pieces(tokenizer, tokens[:0])
    pieces.add(tokens)
    text, key = coloured(list(zip(pieces.pieces, used.tolist(), strict=True)))
    return f'<h2>{escaped(name)}, a text of it</h2>{key}<div class="panel sample">{text}</div>'
