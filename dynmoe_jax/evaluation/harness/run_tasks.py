"""Tasks of the harness put to a model: answers, tables, files."""

import time
from collections.abc import Mapping
from pathlib import Path

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate

from dynmoe_jax.console import console, warn
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.harness.model import HarnessModel
from dynmoe_jax.evaluation.harness.quiet import quiet_harness
from dynmoe_jax.evaluation.report.task_page import write_page
from dynmoe_jax.evaluation.report.task_results import TaskResult, collect, write_results
from dynmoe_jax.evaluation.report.task_tables import print_tables
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter
from dynmoe_jax.runs.formatting import decimals


def run_tasks(
    tasks: Mapping[str, list[Task | Group]],
    scorer: Scorer,
    writer: TreeWriter,
    tokenizer: Tokenizer,
    answers: AnswerFile,
    folder: Path,
    *,
    title: str,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int = 256,
    begin_with_bos: bool | None = None,
) -> dict[str, TaskResult]:
    """Evaluates, prints the paper's two tables beside the model's own numbers, writes files.

    Args:
      tasks: by the name they were asked for with.
      scorer: of the model.
      writer: of the model.
      tokenizer: of the model.
      answers: where answers are kept.
      folder: of the results.
      title: of the page.
      limit: items of each task at the most.
      num_fewshot: examples before each question; None: as each task is defined.
      max_new_tokens: tokens written after a prompt, where a task does not say.
      begin_with_bos: whether BOS stands before every text; None: as the tokenizer says.

    Returns:
      the results by task.
    """
    model = HarnessModel(scorer, writer, tokenizer, answers, max_new_tokens, begin_with_bos)
    started = time.perf_counter()
    with quiet_harness():
        found = simple_evaluate(
            model,
            tasks=[task for parts in tasks.values() for task in parts],
            limit=limit,
            num_fewshot=num_fewshot,
        )
    seconds = time.perf_counter() - started
    names = {asked: [part_name(part) for part in parts] for asked, parts in tasks.items()}
    results = collect(found, names, model.experts)
    print_tables(results)
    for sentence in model.remarks.sentences():
        warn(sentence)
    read = {
        "tokens_asked": scorer.tokens_asked + writer.tokens_asked,
        "tokens_read": scorer.tokens_read + writer.tokens_read,
    }
    paths = {
        "results": write_results(
            folder,
            found,
            results,
            {
                "seconds": seconds,
                **read,
                "window": scorer.max_length,
                "remarks": model.remarks.record(),
            },
        ),
        "page": write_page(folder, title, results, model.experts, tokenizer),
    }
    items = sum(result.items for result in results.values())
    effort = "all answers were there already"
    if read["tokens_asked"]:
        effort = f"of {read['tokens_asked']:,} tokens, {read['tokens_read']:,} had to be read"
    console.print(f" {items:,} items in {decimals(seconds, 1)} s; {effort}.")
    for name, path in paths.items():
        console.print(f" {name:<8} {path}", soft_wrap=True, markup=False)
    return results


def part_name(part: Task | Group) -> str:
    """Name of a task or a group in the harness's results."""
    return part.name if isinstance(part, Group) else part.task_name
