"""A trained run, ready to use."""

import contextlib
from pathlib import Path

import jax
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.console import warn
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.model import Decoder, decoder_structure, parameter_shapes
from dynmoe_jax.training.checkpoint import FOLDER, Checkpoints
from dynmoe_jax.training.recovery import damaged_sentence, newest_whole
from dynmoe_jax.training.text import load_tokenizer


def load_run(
    workdir: Path | str, *, best: bool = False
) -> tuple[config.Config, Decoder, Tokenizer]:
    """A trained model, ready to use, on the first device.

    Args:
      workdir: the run's folder.
      best: take the checkpoint with the lowest held-out loss, if one has any, not the newest
        (see ``config.checkpoint.keep_best``).

    Returns:
      the run's settings, its decoder and its tokenizer.

    Raises:
      ConfigError: there is no checkpoint in ``workdir``.
      CheckpointError: none of its checkpoints can be read.
      DataError: the tokenizer is not the one that the model was trained with.
    """
    workdir = Path(workdir)
    if not (workdir / FOLDER).is_dir():
        raise config.ConfigError(f"{str(workdir)!r} holds no run; give the --workdir of one.")
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        step, damaged = newest_whole(checkpoints)
        if step is None:
            raise config.ConfigError(f"{str(workdir)!r} holds no checkpoint yet; train it first.")
        for bad, damage in damaged.items():
            warn(damaged_sentence(bad, damage, step))
        if best:
            step = checkpoints.best_step() or step
        cfg = checkpoints.config(step)
        tokenizer = load_tokenizer(workdir, checkpoints.position(step))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        params = checkpoints.params(step, jax.tree.map(place, parameter_shapes(cfg.model)))
    return cfg, nnx.merge(decoder_structure(cfg.model), params), tokenizer
