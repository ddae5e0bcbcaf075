"""A foreign model as the checkpoint of a run's folder, without ever holding it as a whole."""

import contextlib
import math
from pathlib import Path

import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.console import Stage, stage, warn
from dynmoe_jax.data import Tokenizer, remove_tokenizer
from dynmoe_jax.data.tokenizers.vocabulary import token_text
from dynmoe_jax.interop.described import describe
from dynmoe_jax.interop.files.source import open_source
from dynmoe_jax.interop.foreign import ForeignModel
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.begun import make_folder
from dynmoe_jax.runs.checkpoint import FOLDER, IMPORTED, Checkpoints
from dynmoe_jax.runs.saving.streamed import Index, StreamedArray

_NAMED = 5
STEP = 0
"""An imported model has done no step of ours."""


def import_model(source: Path | str, workdir: Path | str) -> config.Config:
    """Writes a folder that :func:`dynmoe_jax.runs.load.load_run` reads.

    Tensors are read, and the checkpoint is written, slice by slice: one layer of one parameter, or
    one expert of it, is in memory at a time.

    Args:
      source: a folder in Hugging Face's format, or a ``.gguf`` file.
      workdir: the run's folder, which must hold no run.

    Returns:
      the settings that the run now has.

    Raises:
      CheckpointError: the foreign model cannot be read, or is not what its configuration says.
      ConfigError: ``workdir`` holds a run, or cannot be written.
      DataError: the tokenizer cannot be read.
    """
    workdir = Path(workdir).expanduser()
    if (workdir / FOLDER).is_dir() and any((workdir / FOLDER).iterdir()):
        raise config.ConfigError(f"--to={workdir} holds checkpoints of a run; name another folder.")
    foreign = describe(open_source(source))
    cfg, shapes = foreign.config, foreign.shapes
    tokenizer = foreign.source.tokenizer()
    make_folder(workdir)
    if tokenizer is None:
        warn(f"{source} holds no tokenizer; put one into {workdir} before the model meets text.")
    else:
        remove_tokenizer(workdir)
        tokenizer.save(workdir / tokenizer.name_in_run)
        _compare(tokenizer, cfg.model.vocab_size)
        if tokenizer.ends_with_eos:
            warn(
                f"The tokenizer of {source} puts EOS after each text; prompts and texts to score "
                "are read without it here."
            )
    position = {"tokenizer": tokenizer.fingerprint if tokenizer else "", IMPORTED: str(source)}
    megabytes = sum(4 * math.prod(shape) for shape in shapes.values()) / 1e6
    with (
        stage(f"Importing {foreign.architecture.name}", megabytes, "MB") as shown,
        contextlib.closing(Checkpoints(workdir, cfg.checkpoint)) as checkpoints,
    ):
        model = ForeignModel(foreign)
        like = parameter_shapes(cfg.model).flat_state()
        leaves = [(path, leaf.replace(_streamed(model, path, shown))) for path, leaf in like]
        params = nnx.from_flat_state(leaves)
        checkpoints.save(STEP, {"params": params}, position, cfg)
    return cfg


def _compare(tokenizer: Tokenizer, rows: int) -> None:
    """Says which ids of a tokenizer have no row in the embedding."""
    more = range(rows, tokenizer.vocab_size)
    if not more:
        return
    named = ", ".join(repr(token_text(tokenizer, token)) for token in more[:_NAMED])
    rest = f" and {len(more) - _NAMED} more" if len(more) > _NAMED else ""
    warn(
        f"The tokenizer has {tokenizer.vocab_size:,} ids, the embedding of the model {rows:,} "
        f"rows; text with one of the others ({named}{rest}) is refused."
    )


def _streamed(model: ForeignModel, path: tuple, shown: Stage) -> StreamedArray:
    """The parameter at a path, to be read when it is written: cut as its tensors cut it."""

    def read(index: Index) -> np.ndarray:
        values = model.read(path, index)
        shown.advance(values.nbytes / 1e6)
        return values

    return StreamedArray(model.described.shapes[path], read, model.axes(path))
