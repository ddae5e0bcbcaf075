"""A run's model as a folder in Hugging Face's format, one parameter in memory at a time."""

import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.data import Tokenizer, find_tokenizer
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.mapping import parameter_slices
from dynmoe_jax.interop.architectures.registry import architecture_for
from dynmoe_jax.interop.files.tensor_files import write_json
from dynmoe_jax.interop.files.tensor_writer import TensorWriter
from dynmoe_jax.interop.files.tokenizer_files import write_tokenizer
from dynmoe_jax.interop.frozen_router import with_frozen_router
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.load import OpenedRun, opened_run

_CODE = Path(__file__).parent / "remote_code"
SHARD_BYTES = 5 * 10**9
"""As transformers cuts them."""


def export_model(
    workdir: Path | str,
    folder: Path | str,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    best: bool = False,
) -> Architecture:
    """Writes a model, its tokenizer and, where transformers has no class for it, its code.

    Args:
      workdir: the run's folder.
      folder: a folder that is not there yet, or is empty.
      dtype: ``float32`` or ``bfloat16``.
      shard_bytes: size above which the tensors are split over files.
      best: take the checkpoint with the lowest held-out loss, if one has any, not the newest.

    Returns:
      the architecture that the model was written as.

    Raises:
      CheckpointError: no architecture has such a model, or no checkpoint can be read.
      ConfigError: there is no run in ``workdir``, or ``folder`` is not empty.
      DataError: the tokenizer is not the one that the model was trained with.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise config.ConfigError(f"--to={folder} is not empty; name another folder.")
    with opened_run(Path(workdir).expanduser(), best=best) as run:
        model = with_frozen_router(run)
        architecture = architecture_for(model)
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer = run.tokenizer() if find_tokenizer(run.workdir) else None
        try:
            unfinished.mkdir(parents=True)
            _write_tensors(run, model, architecture, unfinished, dtype, shard_bytes)
            _write_settings(model, architecture, tokenizer, unfinished, dtype)
            if tokenizer is not None:
                write_tokenizer(tokenizer, unfinished)
            for name in architecture.code:
                shutil.copyfile(_CODE / name, unfinished / name)
            if folder.exists():
                folder.rmdir()
            unfinished.replace(folder)
        except OSError as error:
            raise config.ConfigError(
                f"--to={folder} cannot be written ({error.strerror}); make room, or name another "
                "folder."
            ) from error
    return architecture


def _write_tensors(
    run: OpenedRun,
    model: config.Model,
    architecture: Architecture,
    folder: Path,
    dtype: str,
    shard_bytes: int,
) -> None:
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}
    found = parameter_slices(architecture.rules, model, shapes)
    foreign = {name: ours.layout.foreign_shape(ours.shape(shapes)) for name, ours in found.items()}
    idle = architecture.idle_tensors(model)
    writer = TensorWriter(folder, foreign | idle, dtype, shard_bytes)
    names = defaultdict(list)
    for name, ours in found.items():
        names[ours.path].append(name)
    for name, shape in idle.items():
        writer.write(name, np.zeros(shape, np.float32))
    megabytes = sum(4 * math.prod(shape) for shape in shapes.values()) / 1e6
    with stage(f"Exporting {architecture.name}", megabytes, "MB") as shown:
        for path in shapes:
            for index, values in run.slices(path):
                for name in names[path]:
                    ours = found[name]
                    if index is not None and ours.index[0] != index:
                        continue
                    inside = ours.index if index is None else ours.index[1:]
                    writer.write(name, ours.layout.to_foreign(values[inside]))
                shown.advance(values.nbytes / 1e6)
    writer.check_complete()


def _write_settings(
    model: config.Model,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: str,
) -> None:
    settings = {"architectures": [architecture.name], **architecture.model_to_hf(model)}
    settings["torch_dtype"] = dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[name] = None
    if tokenizer is not None:
        ends = list(tokenizer.end_ids)
        settings["bos_token_id"] = tokenizer.bos_id
        settings["eos_token_id"] = tokenizer.eos_id if len(ends) == 1 else ends
    write_json(folder / "config.json", settings)
