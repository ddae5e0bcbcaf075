"""A model with experts, drawn at random, that nothing has to be compiled for; its run on disk."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.data import train_tokenizer
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter
from dynmoe_jax.model import decoder_structure, parameter_shapes
from dynmoe_jax.runs import checkpoint
from dynmoe_jax.training.step import TrainState

ITEMS = Path(__file__).parent / "fixtures" / "items"
SETTINGS = config.Config(
    model=config.Model(
        num_layers=2,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        head_width=4,
        vocab_size=400,
        max_seq_len=4096,
        moe=config.MoE(num_experts=4, hidden_width=8, top_p={"threshold": 0.6}),
    ),
    data=config.Data(seq_len=512),
)


@pytest.fixture(scope="session")
def items():
    """Folder with a few items of each task."""
    return ITEMS


@pytest.fixture(scope="session")
def settings():
    return SETTINGS


@pytest.fixture(scope="session")
def state():
    random = np.random.default_rng(5)
    draw = lambda x: jnp.asarray(random.normal(scale=0.5, size=x.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(SETTINGS.model))
    return TrainState(jnp.int32(1), params, {})


@pytest.fixture(scope="session")
def decoder(state):
    return nnx.merge(decoder_structure(SETTINGS.model), state.params)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = [path.read_text(encoding="utf-8") for path in sorted(ITEMS.rglob("*.json*"))
             if path.suffix != ".gz"]  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(texts, SETTINGS.model.vocab_size, path)


@pytest.fixture(scope="session")
def workdir(state, tokenizer, tmp_path_factory):
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(folder / tokenizer.name_in_run)
    checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint())
    checkpoints.save(1, state, {"row": 1, "tokenizer": tokenizer.fingerprint}, SETTINGS)
    checkpoints.close()
    return folder


@pytest.fixture
def make_scorer(decoder):
    """(max_length) -> a scorer whose batches are small."""
    return lambda max_length=256: Scorer(decoder, 512, max_length)


@pytest.fixture(scope="session")
def writer(decoder, tokenizer):
    """Writes texts with the model, in small batches."""
    return TreeWriter(decoder, 512, tokenizer.vocab_size, tokenizer.eos_id)


@pytest.fixture(scope="session")
def plain(decoder):
    """request -> (log p, greedy, experts [N, L]) by one forward pass over its tokens alone."""
    run = jax.jit(lambda tokens: decoder(tokens[None]))

    def ask(request):
        read = np.array(request.read)
        # Padding behind a text changes nothing in it, and few lengths are compiled.
        output = run(np.pad(read, (0, -len(read) % 64)))
        log_probs = np.asarray(jax.nn.log_softmax(output.logits[0]))[: len(read)]
        targets = np.array(request.tokens[-request.scored :])
        rows = log_probs[-request.scored :]
        experts_NL = np.asarray(output.routing.experts_per_token)[:, 0, : len(read)]
        chosen = rows[np.arange(len(targets)), targets]
        return chosen.sum(), bool((rows.argmax(-1) == targets).all()), experts_NL

    return ask
