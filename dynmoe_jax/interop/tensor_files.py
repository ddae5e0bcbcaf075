"""The tensors of a checkpoint folder: one safetensors file, or several with an index."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Registers bfloat16 with numpy, which safetensors needs to hand out such a tensor.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors

from dynmoe_jax.interop.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, as transformers lays it out."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold the tensors of a checkpoint.

    Raises:
      CheckpointError: there are none, or the index names one that is missing.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX} must hold a weight_map.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file} does not exist.")
    return files


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the files' headers alone."""
    shapes = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no iterator)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def read_tensors(files: Iterable[Path], wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) of the wanted tensors, one at a time."""
    wanted = set(wanted)
    for file in files:
        with _opened(file) as tensors:
            for name in wanted.intersection(tensors.keys()):
                yield name, tensors.get_tensor(name)


@contextlib.contextmanager
def _opened(file: Path):
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as safetensors: {reason}.") from error
