"""Two runs of models that have one tokenizer and no more in common."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.data import train_tokenizer
from dynmoe_jax.model import decoder_structure, parameter_shapes
from dynmoe_jax.runs import checkpoint
from dynmoe_jax.runs.text import TRAINED
from dynmoe_jax.training.step import TrainState


@pytest.fixture(scope="package")
def other_settings(settings):
    """One dense layer, narrower."""
    moe = config.MoE(every_n_layers=0)
    model = dataclasses.replace(
        settings.model, num_layers=1, width=8, num_heads=2, hidden_width=16, moe=moe
    )
    return dataclasses.replace(settings, model=model)


@pytest.fixture(scope="package")
def other_state(other_settings):
    random = np.random.default_rng(6)
    draw = lambda x: jnp.asarray(random.normal(scale=0.3, size=x.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(other_settings.model))
    return TrainState(jnp.int32(1), params, {})


def written(folder, tokenizer, state, settings):
    """A run's folder with one checkpoint."""
    tokenizer.save(folder / tokenizer.name_in_run)
    checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint())
    checkpoints.save(1, state, {"row": 1, "tokenizer": tokenizer.fingerprint}, settings)
    checkpoints.close()
    return folder


@pytest.fixture(scope="package")
def other(other_settings, other_state, tokenizer, tmp_path_factory):
    """Folder of the other run."""
    return written(tmp_path_factory.mktemp("other"), tokenizer, other_state, other_settings)


@pytest.fixture(scope="package")
def stranger(other_settings, other_state, tmp_path_factory):
    """Folder of a run with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("stranger")
    tokenizer = train_tokenizer(["Another text for another tokenizer. " * 9], 300, folder / TRAINED)
    return written(folder, tokenizer, other_state, other_settings)


@pytest.fixture(scope="package")
def decoders(decoder, other_settings, other_state):
    """Both models."""
    return decoder, nnx.merge(decoder_structure(other_settings.model), other_state.params)
