"""Sampling against the decoder itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.inference import generate as generate_module
from dynmoe_jax.inference.generate import generate, positions_for
from dynmoe_jax.model import decoder_structure, parameter_shapes

MODEL = config.Model(
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    hidden_width=8,
    vocab_size=20,
    max_seq_len=16,
    moe=config.MoE(num_experts=4, hidden_width=8, top_p=0.6),
)
PROMPT = np.array([1, 7, 3], np.int32)
NEW = 9
NEVER = -1


def draw(model):
    rng = np.random.default_rng(3)
    fill = lambda x: jnp.asarray(rng.normal(scale=0.8, size=x.shape), jnp.float32)  # noqa: E731
    return decoder_structure(model), jax.tree.map(fill, parameter_shapes(model))


def sample(structure, params, new, temperature=0.0, seed=0, eos_id=NEVER, vocab_size=None):
    return generate(
        structure,
        params,
        PROMPT,
        new,
        temperature=temperature,
        seed=seed,
        eos_id=eos_id,
        vocab_size=vocab_size or MODEL.vocab_size,
    )


def test_rows_of_the_embedding_that_the_tokenizer_lacks_are_never_drawn(model):
    ids = sample(*model, NEW, temperature=50.0, vocab_size=5).ids
    assert ids.max() < 5
    assert sample(*model, NEW, temperature=50.0).ids.max() >= 5


def test_positions_behind_the_text_change_nothing(model, monkeypatch):
    wanted = sample(*model, NEW, temperature=1.0)
    monkeypatch.setattr(generate_module, "positions_for", lambda end, platform: end + 7)
    actual = sample(*model, NEW, temperature=1.0)
    assert actual.ids.tolist() == wanted.ids.tolist()
    np.testing.assert_allclose(actual.experts, wanted.experts)


def test_accelerators_compute_whole_tiles():
    assert positions_for(69, "cpu") == 69
    assert positions_for(69, "tpu") == 128
    assert positions_for(256, "gpu") == 256


@pytest.fixture(scope="module")
def model():
    return draw(MODEL)


@pytest.fixture(scope="module")
def continued(model):
    def run(temperature=0.0, seed=0, eos_id=NEVER):
        return sample(*model, NEW, temperature=temperature, seed=seed, eos_id=eos_id)

    return run


@pytest.fixture(scope="module")
def forward(model):
    """One pass over prompt and continuation, nothing padded."""
    decoder = nnx.merge(*model)
    return jax.jit(lambda tokens_L: decoder(tokens_L[None]))


def test_greedy_takes_the_most_probable_token_at_every_step(continued, forward):
    ids = continued().ids
    assert len(set(ids.tolist())) > 2  # a model that repeats itself would show nothing
    logits_LV = forward(np.concatenate([PROMPT, ids])).logits[0]
    np.testing.assert_array_equal(np.argmax(logits_LV, axis=-1)[2:-1], ids)


def test_experts_are_those_of_the_position_that_predicted(continued, forward):
    made = continued()
    output = forward(np.concatenate([PROMPT, made.ids]))
    wanted = np.asarray(output.routing.experts_per_token)[:, 0].mean(axis=0)[2:-1]
    np.testing.assert_allclose(made.experts, wanted)
    assert len(set(wanted.tolist())) > 1


def test_seed_decides_the_draw_and_greedy_has_none(continued):
    np.testing.assert_array_equal(continued(1.0, seed=1).ids, continued(1.0, seed=1).ids)
    assert not np.array_equal(continued(1.0, seed=1).ids, continued(1.0, seed=2).ids)
    np.testing.assert_array_equal(continued(0.0, seed=1).ids, continued(0.0, seed=2).ids)
    np.testing.assert_array_equal(continued(1e-4, seed=1).ids, continued(0.0).ids)


def test_first_token_is_drawn_from_the_tempered_distribution(continued, forward):
    draws = 400
    ids = [continued(2.0, seed=seed).ids[0] for seed in range(draws)]
    share_V = np.bincount(ids, minlength=20) / draws
    tokens_L = np.concatenate([PROMPT, continued().ids])
    wanted_V = np.asarray(jax.nn.softmax(forward(tokens_L).logits[0, 2] / 2.0))
    error_V = np.sqrt(wanted_V * (1 - wanted_V) / draws)
    assert np.all(np.abs(share_V - wanted_V) < 4 * error_V + 1 / draws)


def test_ends_before_the_token_that_ends_a_text(continued):
    whole = continued()
    end = int(whole.ids[4])
    first = int(np.argmax(whole.ids == end))
    ended = continued(eos_id=end)
    np.testing.assert_array_equal(ended.ids, whole.ids[:first])
    np.testing.assert_array_equal(ended.experts, whole.experts[:first])


def test_dense_model_writes_without_experts():
    dense = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, every_n_layers=0))
    made = sample(*draw(dense), 2)
    assert (len(made.ids), len(made.experts)) == (2, 0)
