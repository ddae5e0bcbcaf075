"""The tensors of a checkpoint folder: one safetensors file, or several with an index."""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Registers bfloat16 with numpy, which safetensors needs to hand out such a tensor.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors

from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.quoted import named, shown
from dynmoe_jax.runs.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16", "F64")
"""Types of tensors that are read, as safetensors calls them."""

_ROWS = 1024


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, as transformers lays it out."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint, by the tensor's name.

    An index decides which file a tensor is read from, wherever else it lies; what it does not list
    is not there.

    Raises:
      CheckpointError: there is no file, the index names a file or a tensor that is missing, or a
        file cannot be read.
    """
    if not (folder / INDEX).exists():
        return dict.fromkeys(_headers(folder / SINGLE), folder / SINGLE)
    names = _weight_map(folder)
    if SINGLE not in names.values() and (folder / SINGLE).exists():
        raise CheckpointError(
            f"{folder / SINGLE} holds tensors, and {INDEX} beside it names other files; remove one "
            "of the two."
        )
    files = {name: folder / name for name in dict.fromkeys(names.values())}
    for tensor, name in names.items():
        if not os.path.exists(files[name]):  # no to a name that is too long, too
            raise CheckpointError(
                f"{folder / INDEX} names {named(name)} for {named(tensor)}, but {folder}/"
                f"{named(name)} does not exist."
            )
    held = {name: _headers(file) for name, file in files.items()}
    for tensor, name in names.items():
        if tensor not in held[name]:
            raise CheckpointError(
                f"{folder / INDEX} names {named(name)} for {named(tensor)}, but that file lacks it."
            )
    return {tensor: files[name] for tensor, name in names.items()}


def _weight_map(folder: Path) -> dict[str, str]:
    """The name of the file of each tensor, as the index of a folder has it."""
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{folder / INDEX} must hold a weight_map.")
    for tensor, name in names.items():
        inside = isinstance(name, str) and name and "\0" not in name
        if not inside or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{folder / INDEX} names {shown(name)} for {named(tensor)}, which is no file of "
                "that folder."
            )
    return names


def tensor_shapes(file_of: Mapping[str, Path]) -> dict[str, Shape]:
    """Shapes by name, from the files' headers alone.

    Raises:
      CheckpointError: a file cannot be read, or a tensor is of a type that is not read.
    """
    headers = {file: _headers(file) for file in dict.fromkeys(file_of.values())}
    shapes = {}
    for name, file in file_of.items():
        kind, shapes[name] = headers[file][name]
        if kind not in DTYPES:
            raise CheckpointError(
                f"tensor {named(name)} in {file} is of type {kind}; {', '.join(DTYPES)} are read."
            )
    return shapes


def read_tensors(
    file_of: Mapping[str, Path], wanted: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) of the wanted tensors, one at a time, file by file."""
    names: dict[Path, list[str]] = defaultdict(list)
    for name in wanted:
        names[file_of[name]].append(name)
    for file, inside in names.items():
        with _opened(file) as tensors:
            for name in inside:
                yield name, tensors.get_tensor(name)


def tensors_are_equal(file_of: Mapping[str, Path], names: tuple[str, str]) -> bool:
    """Whether two matrices of one shape hold the same numbers; reads some rows at a time."""
    with _opened(file_of[names[0]]) as one, _opened(file_of[names[1]]) as other:
        parts = one.get_slice(names[0]), other.get_slice(names[1])
        length = parts[0].get_shape()[0]
        for row in range(0, length, _ROWS):
            end = min(row + _ROWS, length)  # safetensors does not cut it
            rows = [part[row:end].astype(np.float32) for part in parts]
            if not np.array_equal(*rows, equal_nan=True):
                return False
    return True


def _headers(file: Path) -> dict[str, tuple[str, Shape]]:
    """(type, shape) of each tensor in a file."""
    with _opened(file) as tensors:
        parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (p.get_dtype(), tuple(p.get_shape())) for name, p in parts.items()}


@contextlib.contextmanager
def _opened(file: Path):
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            yield tensors
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist.") from None
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as safetensors: {reason}.") from error
