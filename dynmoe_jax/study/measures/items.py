"""Accuracy on evaluation items that lie on this machine, and what a guess would have."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.evaluation.__main__ import evaluate, parsed
from dynmoe_jax.study.measures.measure import Measure

FOLDER = Path("evaluation") / "items"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def tasks_in(folder: Path) -> list[str]:
    """Names of the tasks whose items a folder has, as ``evaluation --data_dir`` reads them.

    Raises:
      ConfigError: there are none, or the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise config.ConfigError(
            f"--items={folder} needs lm-evaluation-harness; install it: "
            "pip install 'dynmoe_jax[eval]'."
        )
    names = {
        path.name.removesuffix(suffix)
        for suffix in _SUFFIXES
        for path in folder.rglob(f"*{suffix}")
    }
    found = sorted(name for name in names if "." not in name)
    if not found:
        raise config.ConfigError(
            f"--items={folder} has no items; put them there as TASK.jsonl, TASK a task of "
            "lm-evaluation-harness."
        )
    return found


def digest_of(folder: Path) -> str:
    """SHA-256 of the files of items in a folder, names included."""
    digest = hashlib.sha256()
    for path in sorted(path for suffix in _SUFFIXES for path in folder.rglob(f"*{suffix}")):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Items(Measure):
    """All models of the comparison, where there is a folder of items."""

    def is_of(self, model):
        """All but ablations."""
        return not model.startswith("ablation")

    def depends_on(self, items):
        """The items."""
        return {"items": digest_of(items) if items else ""}

    def take(self, run, items):
        """Share of right answers by task, and that of a guess; answers are kept in the run."""
        if items is None:
            return {}
        output = run.workdir / FOLDER / digest_of(items)[:16]
        asked = parsed(
            [
                f"--workdir={run.workdir}",
                f"--tasks={','.join(tasks_in(items))}",
                f"--data_dir={items}",
                f"--output={output}",
            ]
        )
        evaluate(asked)
        return {
            path.stem.removeprefix("samples_"): _of_task(path)
            for path in sorted(output.glob("samples_*.jsonl"))
        }


def _of_task(path: Path) -> dict[str, Any]:
    """Accuracy of the answers in a file of samples; chance is NaN where answers are written."""
    with path.open(encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    right = np.array([sample.get("acc", sample.get("exact_match", 0.0)) for sample in samples])
    choices = np.array([len(sample["resps"]) for sample in samples])
    return {
        "items": len(samples),
        "right": right.astype(float),
        "accuracy": float(right.mean()),
        "chance": float(np.mean(1 / choices)) if choices.min() > 1 else float("nan"),
    }
