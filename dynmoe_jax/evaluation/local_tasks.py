"""The harness's own tasks, on items that lie on this machine."""

import difflib
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from dynmoe_jax import config
from dynmoe_jax.console import stage, warn
from dynmoe_jax.evaluation.harness_quiet import quiet_harness

ALIASES = {"bbh": "bbh_fewshot"}
"""The harness calls BIG-Bench-Hard with chains of thought ``bbh``.  A model that was only
pre-trained is asked for direct answers, after three examples."""

_TRIMMED = {
    "name": "none",
    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
}
"""Of an alias: answers count without the spaces around them.  By the harness's own definition of
``bbh_fewshot``, every answer of a model whose tokens begin with their space is wrong: SmolLM2 gets
0%."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def load_tasks(names: list[str], data_dir: Path | None) -> dict[str, list[Task | Group]]:
    """What each name stands for: a task, a group of tasks, or the several tasks of a tag.

    Args:
      names: of the harness, or of :data:`ALIASES`.
      data_dir: a folder (and its folders) with the items of each task, in the fields of its
        original: ``TASK.jsonl``, also ``.json`` and ``.gz``, where TASK is the task's name or the
        name of its data set.  ``TASK.train.jsonl``, if it is there, gives examples for
        ``num_fewshot``.  None: the harness gets the data itself, from the network.

    Raises:
      ConfigError: a task is not known, or its file is missing or cannot be read.
    """
    manager = _manager()
    index = manager.task_index
    for name in names:
        if ALIASES.get(name, name) not in index:
            raise _unknown(name, list(index))
    # The factory takes the class of a task as an override, for all tasks of a group.  Its public
    # face, ``TaskManager.load``, does not hand overrides of a group on without mixing up names.
    local = {"class": _local_task(data_dir)} if data_dir else {}
    loaded: dict[str, list[Task | Group]] = {}
    with quiet_harness():
        for name in names:
            entry = index[ALIASES.get(name, name)]
            trimmed = {"filter_list": [_TRIMMED]} if name in ALIASES else {}
            built = manager._factory.build(entry, overrides=local | trimmed, registry=index)
            loaded[name] = built if isinstance(built, list) else [built]
    return loaded


@functools.cache
def _manager() -> TaskManager:
    """Knows all tasks; to read them takes seconds."""
    with stage("Reading what tasks there are"):
        return TaskManager()


def _unknown(name: str, known: list[str]) -> config.ConfigError:
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all."
    return config.ConfigError(f"--tasks names {name!r}, which the harness does not know; {hint}")


def _local_task(data_dir: Path) -> type[ConfigurableTask]:
    """A class of tasks whose items are files of ``data_dir``."""
    if not data_dir.is_dir():
        raise config.ConfigError(f"--data_dir={data_dir} is no folder; name one with task files.")

    class LocalTask(ConfigurableTask):
        # The factory looks for the parameter ``config``.
        def __init__(self, config: dict[str, Any]):
            super().__init__(config={k: v for k, v in config.items() if k != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            del dataset_kwargs, kwargs
            original = self.config.dataset_name or self.config.dataset_path.rsplit("/", 1)[-1]
            names = [self.config.task, original]
            path = find_items(data_dir, names)
            split = self.config.test_split or self.config.validation_split or "test"
            found = {split: datasets.Dataset.from_list(read_items(path))}
            train = next(iter(_matches(data_dir, [f"{name}.train" for name in names])), None)
            if train:
                found["train"] = datasets.Dataset.from_list(read_items(train))
            self.config.training_split = "train" if train else None
            self.config.test_split, self.config.validation_split = split, None
            if self.fewshot_cfg.samples is None:
                # Named, so that the harness leaves the item itself out of its examples.
                self.fewshot_cfg.split = "train" if train else split
                self.fewshot_cfg.process_docs = self.config.process_docs
            self.dataset = datasets.DatasetDict(found)

    return LocalTask


def find_items(data_dir: Path, names: list[str]) -> Path:
    """The file with a task's items.

    Args:
      data_dir: where to look, folders in it included.
      names: what the file may be called, before its suffix; the first that is there is taken.

    Raises:
      ConfigError: there is none, or two of one name.
    """
    found = _matches(data_dir, names)
    if not found:
        raise config.ConfigError(
            f"--data_dir={data_dir} has no items of the task {names[0]}; put them there as "
            f"{names[0]}.jsonl."
        )
    if len(found) > 1:
        raise config.ConfigError(
            f"--data_dir={data_dir} has the task {names[0]} twice, as {found[0]} and {found[1]}; "
            "keep one of them."
        )
    return found[0]


def _matches(data_dir: Path, names: list[str]) -> list[Path]:
    for name in names:
        wanted = {name + suffix for suffix in SUFFIXES}
        found = sorted(path for path in data_dir.rglob(f"{name}.*") if path.name in wanted)
        if found:
            return found
    return []


def read_items(path: Path) -> list[dict[str, Any]]:
    """The items of a file: a record a line, a list, or BIG-Bench's ``{"examples": [...]}``.

    Raises:
      ConfigError: the file cannot be read, or holds no records.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        if ".jsonl" in path.suffixes:
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            items = json.loads(text)
            items = items.get("examples") if isinstance(items, dict) else items
    except (OSError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise config.ConfigError(f"{path} cannot be read as JSON: {reason}.") from error
    if not (items and isinstance(items, list) and all(isinstance(item, dict) for item in items)):
        raise config.ConfigError(f"{path} must hold records, one at least.")
    return items


def announce_aliases(names: list[str]) -> None:
    """Says which of the names stand for another task."""
    for name in names:
        if name in ALIASES:
            warn(
                f"{name} is run as {ALIASES[name]}: direct answers, no chains of thought; spaces "
                "around an answer do not count."
            )
