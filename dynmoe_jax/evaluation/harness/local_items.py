"""Items of this machine as a data set of lm-evaluation-harness, each with what its file says."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable

import datasets
from lm_eval.api.task import ConfigurableTask

from dynmoe_jax import config
from dynmoe_jax.console import warn
from dynmoe_jax.evaluation.harness.item_files import Item

_NAMED = 5


class Items(list):
    """A data set of records that Arrow, which wants columns of one type, would change.

    It has what the harness's tasks use of ``datasets.Dataset``.
    """

    @property
    def features(self) -> dict[str, None]:
        """The names of all fields."""
        return dict.fromkeys(name for item in self for name in item)

    def map(self, function: Callable[[Item], Item | None]) -> "Items":
        """Items with what a function makes of each, as ``Dataset.map`` does."""
        made = []
        for item in copy.deepcopy(self):
            changed = function(item)
            made.append({**item, **changed} if changed is not None else item)
        return Items(made)

    def filter(self, function: Callable[[Item], bool]) -> "Items":
        """The items for which a function says yes."""
        return Items(item for item in self if function(item))

    def select(self, numbers: Iterable[int]) -> "Items":
        """The items with these numbers, from 0."""
        return Items(self[number] for number in numbers)


DataSet = datasets.Dataset | Items


def as_data_set(items: list[Item]) -> DataSet:
    """A ``datasets.Dataset`` where that has exactly these items, or :class:`Items`.

    Args:
      items: all with the same fields.
    """
    try:
        made = datasets.Dataset.from_list(items)
        same = json.dumps(list(made)) == json.dumps(items)
    except Exception:  # of Arrow: columns of several types; of Python: more than 64 bits
        same = False
    return made if same else Items(items)


def usable_docs(task: ConfigurableTask, items: DataSet, name: str) -> DataSet:
    """Makes a task's docs of items; one that the task cannot use is left out, which is said.

    Args:
      task: a task, as far as its ``config`` and ``prompt`` are there.
      items: of a file.
      name: of the file.

    Raises:
      ConfigError: the task can use none of them.
    """
    docs, left_out = _processed(task.config.process_docs, items)
    task.features = list(docs.features)
    numbers = []
    for number, doc in enumerate(docs):
        reason = _unusable(task, doc)
        if reason is None:
            numbers.append(number)
        else:
            left_out.append((number + 1, reason))
    if not numbers:
        why = f" (item {left_out[0][0]}: {left_out[0][1]})" if left_out else ""
        raise config.ConfigError(
            f"{name} has no item of the task {task.config.task}{why}; its fields must be those of "
            "the original data set."
        )
    for number, reason in left_out[:_NAMED]:
        warn(f"{name}: item {number} is left out of {task.config.task}: {reason}.")
    if len(left_out) > _NAMED:
        warn(f"{name}: {len(left_out) - _NAMED:,} more items are left out.")
    return docs if len(numbers) == len(docs) else docs.select(numbers)


def check_examples(task: ConfigurableTask, name: str) -> None:
    """Raises ConfigError if there are fewer examples than ``--num_fewshot`` asks for.

    Args:
      task: with its examples; none of an item's examples is the item itself.
      name: of their file.
    """
    wanted, sampler = task.config.num_fewshot or 0, getattr(task, "sampler", None)
    if not wanted or sampler is None:
        return
    counts = Counter(json.dumps(doc, default=str) for doc in sampler.df)
    left = counts.total()
    if task.fewshot_cfg.split == task.config.test_split:
        left -= max(counts.values(), default=0)
    if wanted > left:
        raise config.ConfigError(
            f"--num_fewshot={wanted} asks for more examples of {task.config.task} than the {left} "
            f"that {name} has for each item; lower it, or add items."
        )


def _processed(process: Callable[[DataSet], DataSet] | None, items: DataSet):
    """Applies a task's own function: (docs, [(number of an item that is left out, why)])."""
    if process is None:
        return items, []
    try:
        return process(items), []
    except Exception:  # it fails in one of its own ways, at an item that is not named
        docs, left_out = Items(), []
        for number in range(len(items)):
            try:
                docs += list(process(as_data_set([items[number]])))
            except Exception as error:
                left_out.append((number + 1, _shortly(error)))
        return docs, left_out


def _unusable(task: ConfigurableTask, doc: Item) -> str | None:
    """Says why the harness would fail at an item; None if it does not."""
    try:
        text, target = task.doc_to_text(doc), task.doc_to_target(doc)
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
        if choices is not None:
            if not (isinstance(choices, list) and choices):
                return f"its choices are {choices!r}, no list of them"
            if not all(isinstance(choice, str) and choice for choice in choices):
                return f"its choices are {choices!r}, not texts"
            if isinstance(target, int):
                choices[target]
    except Exception as error:  # of the task's own functions and templates
        return _shortly(error)
    if not isinstance(text, str) and not (isinstance(text, int) and choices):
        return f"its question is {text!r}, no text"
    if target is None and task.OUTPUT_TYPE != "generate_until":
        return "it has no answer"
    return None


def _shortly(error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
