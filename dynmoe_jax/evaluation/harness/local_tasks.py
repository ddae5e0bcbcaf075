"""The harness's own tasks, on items that lie on this machine."""

import difflib
import functools
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from dynmoe_jax import config
from dynmoe_jax.console import stage, warn
from dynmoe_jax.data.sources.files import shown
from dynmoe_jax.evaluation.harness.item_files import find_items, read_items
from dynmoe_jax.evaluation.harness.local_items import (
    DataSet,
    as_data_set,
    check_examples,
    usable_docs,
)
from dynmoe_jax.evaluation.harness.quiet import quiet_harness

ALIASES = {"bbh": "bbh_fewshot"}
"""The harness calls BIG-Bench-Hard with chains of thought ``bbh``.  A model that was only
pre-trained is asked for direct answers, after three examples."""

_TRIMMED = {
    "name": "none",
    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
}
"""Filter of an alias: answers count without the spaces around them.  By the harness's own
definition of ``bbh_fewshot``, every answer of a model whose tokens begin with their space is wrong
(docs/measurements.md: eval-untrimmed)."""


def load_tasks(names: list[str], data_dir: Path | None) -> dict[str, list[Task | Group]]:
    """Loads what each name stands for: a task, a group of tasks, or the several tasks of a tag.

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
        raise config.ConfigError(
            f"--data_dir={shown(data_dir)} is no folder; name one with task files."
        )

    class LocalTask(ConfigurableTask):
        # The factory looks for the parameter ``config``.
        def __init__(self, config: dict[str, Any]):
            super().__init__(config={k: v for k, v in config.items() if k != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            del dataset_kwargs, kwargs
            original = self.config.dataset_name or self.config.dataset_path.rsplit("/", 1)[-1]
            names = [self.config.task, original]
            split = self.config.test_split or self.config.validation_split or "test"
            self._files = {split: find_items(data_dir, names)}
            train = find_items(data_dir, [f"{name}.train" for name in names], optional=True)
            examples = "examples" if split == "train" else "train"
            if train:
                self._files[examples] = train
            self.config.training_split = examples if train else None
            self.config.test_split, self.config.validation_split = split, None
            if self.fewshot_cfg.samples is None:
                # Named, so that the harness leaves the item itself out of its examples.
                self.fewshot_cfg.split = examples if train else split
            self.dataset = {
                split: as_data_set(read_items(path)) for split, path in self._files.items()
            }
            self._usable: dict[str, DataSet] = {}

        def test_docs(self) -> DataSet:
            return self._docs(self.config.test_split)

        def training_docs(self) -> DataSet | None:
            return self._docs(self.config.training_split) if self.has_training_docs() else None

        def fewshot_docs(self) -> Any:
            split = self.fewshot_cfg.split
            return self._docs(split) if split in self._files else super().fewshot_docs()

        def build_all_requests(self, **kwargs: Any) -> None:
            check_examples(self, shown(self._files.get(self.fewshot_cfg.split, data_dir)))
            super().build_all_requests(**kwargs)

        def _docs(self, split: str) -> DataSet:
            if split not in self._usable:
                name = shown(self._files[split])
                self._usable[split] = usable_docs(self, self.dataset[split], name)
            return self._usable[split]

    return LocalTask


def announce_aliases(names: list[str]) -> None:
    """Says which of the names stand for another task."""
    for name in names:
        if name in ALIASES:
            warn(
                f"{name} is run as {ALIASES[name]}: direct answers, no chains of thought; spaces "
                "around an answer do not count."
            )
