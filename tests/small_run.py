"""A run so small that compiling is all it costs, and what it left behind."""

import dataclasses
import glob
import os
import random
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import train_tokenizer
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs import checkpoint
from dynmoe_jax.runs.text import TRAINED
from dynmoe_jax.training import trainer
from dynmoe_jax.training.step import TrainState

_TEXT = "the a token chooses its experts router mass passes while self return 数据 é"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Glob of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(30):
        words = draw.choices(_TEXT.split(), k=draw.randint(40, 160))
        (folder / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return f"{folder}/*.txt"


@pytest.fixture(scope="session")
def settings(corpus):
    """Six steps of a two-layer model on text files; see :func:`change`."""
    return config.Config(
        model=config.Model(
            num_layers=2,
            width=16,
            num_heads=2,
            num_kv_heads=1,
            head_width=8,
            hidden_width=24,
            vocab_size=300,
            max_seq_len=32,
            init_std=0.1,
            moe=config.MoE(num_experts=4, hidden_width=16, top_p={"threshold": 0.4}),
        ),
        data=config.Data(sources=f"text:{corpus}", seq_len=32, heldout_fraction=0.2),
        train=config.Train(steps=6, batch_size=8, log_every_steps=1),
        optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=2),
        evaluation=config.Evaluation(max_batches=2, sample_tokens=4),
        logging=config.Logging(tensorboard=False),
    )


def change(cfg, **values):
    """``cfg`` with leaves replaced: ``change(cfg, train__steps=3)``."""
    for name, value in values.items():
        cfg = _set(cfg, name.split("__"), value)
    return cfg


def _set(part, names, value):
    if len(names) > 1:
        value = _set(getattr(part, names[0]), names[1:], value)
    return dataclasses.replace(part, **{names[0]: value})


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Has somebody press Ctrl-C while a step is under way."""

    class Interrupted(trainer.PendingStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if self.number == step:
                os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(trainer, "PendingStep", Interrupted)


@pytest.fixture(scope="session", name="change")
def change_fixture():
    """See :func:`change`."""
    return change


@pytest.fixture(scope="session")
def saved_state():
    """(workdir, step) -> every array of a checkpoint by its path, read without the package."""

    def read(workdir: Path, step: int) -> dict[str, np.ndarray]:
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore((workdir / checkpoint.FOLDER / str(step) / "state").absolute())
        return {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    return read


@pytest.fixture(scope="session")
def state(settings):
    """Parameters drawn by numpy: nothing has to compile."""
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(settings.model))
    return TrainState(jnp.int32(3), params, {"moment": jax.tree.map(jnp.copy, params)})


@pytest.fixture(scope="session")
def tokenizer(settings, corpus, tmp_path_factory):
    texts = (Path(path).read_text(encoding="utf-8") for path in sorted(glob.glob(corpus)))
    path = tmp_path_factory.mktemp("tokenizer") / TRAINED
    return train_tokenizer(texts, settings.model.vocab_size, path)


@pytest.fixture
def workdir(settings, state, tokenizer, tmp_path):
    """With checkpoints of steps 3 and 4, of which 4 is the state, and 3 the state plus one."""
    tokenizer.save(tmp_path / TRAINED)
    checkpoints = checkpoint.Checkpoints(tmp_path, config.Checkpoint(keep=2))
    for step in (2, 3, 4):
        params = jax.tree.map(lambda x: x + (step != 4), state.params)  # noqa: B023
        saved = TrainState(jnp.int32(step), params, state.optimizer)
        position = {"row": step, "tokenizer": tokenizer.fingerprint}
        checkpoints.save(step, saved, position, settings)
    checkpoints.close()
    return tmp_path
