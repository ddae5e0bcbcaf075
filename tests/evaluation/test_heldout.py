"""Held-out evaluation against plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.evaluation.heldout import Sums, evaluate, make_eval_step
from dynmoe_jax.model import decoder_structure, parameter_shapes

MODEL = config.Model(
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    vocab_size=12,
    max_seq_len=8,
    moe=config.MoE(num_experts=4, hidden_width=8, top_p={"threshold": 0.6}),
)
BYTES_V = np.arange(12, dtype=np.int32)
LENGTHS = {"books": [[8, 5], [3, 0]], "code": [[7, 8]]}


def draw_batch(lengths, rng):
    tokens, targets = rng.integers(0, 12, (2, 2, 8)).astype(np.int32)
    segments = (np.arange(8) < np.array(lengths)[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions}


def draw_batches():
    rng = np.random.default_rng(0)
    return {name: [draw_batch(rows, rng) for rows in rest] for name, rest in LENGTHS.items()}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(scale=0.5, size=x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, parameter_shapes(MODEL))


@pytest.fixture(scope="module")
def eval_step():
    return make_eval_step(decoder_structure(MODEL), config.Loss(chunk_tokens=8))


@pytest.fixture(scope="module")
def result(eval_step, params):
    return evaluate(eval_step, params, draw_batches(), BYTES_V)


@pytest.fixture(scope="module")
def plain(params):
    """{domain: (nll of each target, the targets, experts [N, tokens])} from the whole logits."""
    decoder = jax.jit(nnx.merge(decoder_structure(MODEL), params).__call__)

    def domain(batches):
        parts = []
        for batch in batches:
            output = decoder(batch["tokens"], batch["segment_ids"], batch["positions"])
            valid = batch["segment_ids"] > 0
            log_probs = jax.nn.log_softmax(output.logits)
            nll = -np.take_along_axis(np.asarray(log_probs), batch["targets"][..., None], -1)
            used = np.asarray(output.routing.experts_per_token)
            parts.append((nll[..., 0][valid], batch["targets"][valid], used[:, valid]))
        return [np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)]

    return {name: domain(batches) for name, batches in draw_batches().items()}


def test_loss_and_bits_per_byte_of_a_domain(result, plain):
    assert list(result.domains) == ["books", "code"]
    for name, (nll, targets, used) in plain.items():
        domain = result.domains[name]
        assert domain.tokens == np.sum(LENGTHS[name])
        np.testing.assert_allclose(domain.loss, nll.mean(), rtol=1e-5)
        bits = nll.sum() / np.log(2) / BYTES_V[targets].sum()
        np.testing.assert_allclose(domain.bits_per_byte, bits, rtol=1e-5)
        np.testing.assert_allclose(domain.experts_per_token_by_layer, used.mean(axis=1))
        np.testing.assert_allclose(domain.experts_per_token, used.mean())


def test_whole_is_weighted_by_tokens_not_by_domains_or_batches(result, plain):
    nll, targets, used = (
        np.concatenate(column, axis=-1) for column in zip(*plain.values(), strict=True)
    )
    np.testing.assert_allclose(result.loss, nll.mean(), rtol=1e-5)
    bits = nll.sum() / np.log(2) / BYTES_V[targets].sum()
    np.testing.assert_allclose(result.bits_per_byte, bits, rtol=1e-5)
    np.testing.assert_allclose(result.experts_per_token_by_layer, used.mean(axis=1))
    np.testing.assert_allclose(np.sum(result.load_by_layer, axis=1), used.mean(axis=1))
    wanted = [np.bincount(layer, minlength=4) for layer in used]
    np.testing.assert_array_equal(result.histogram_by_layer, wanted)


def test_padding_counts_nowhere(eval_step, params, result):
    batches = draw_batches()
    for batch in [*batches["books"], *batches["code"]]:
        padding = batch["segment_ids"] == 0
        for name, poison in (("tokens", 7), ("targets", 3), ("positions", 5)):
            batch[name] = np.where(padding, poison, batch[name]).astype(np.int32)
    assert evaluate(eval_step, params, batches, BYTES_V) == result


def counted(params, batch):
    """A model that is wrong by ln 4 everywhere and has no experts."""
    tokens = (batch["segment_ids"] > 0).sum()
    nothing = np.zeros((0, 1), np.int32)
    return Sums(tokens * np.log(4), tokens, nothing, nothing)


def test_unigram_entropy_and_bits_per_byte_by_hand():
    # Eight targets: four 1s, two 2s, two 3s, so 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2; the ninth and
    # tenth are padding.  ln 4 is two bits a token; the tokens stand for 4*1 + 2*2 + 2*3 = 14 bytes.
    targets = np.array([[1, 1, 1, 1, 2], [2, 3, 3, 9, 9]], np.int32)
    batch = {"targets": targets, "segment_ids": (targets < 9).astype(np.int32)}
    result = evaluate(counted, None, {"only": [batch]}, BYTES_V, place=lambda batch: batch)
    np.testing.assert_allclose(result.unigram_entropy, 1.5 * np.log(2))
    np.testing.assert_allclose(result.bits_per_byte, 8 * 2 / 14)
    np.testing.assert_allclose(result.loss, np.log(4))


def test_dense_model_has_no_experts_to_count():
    batch = draw_batch([8, 5], np.random.default_rng(0))
    result = evaluate(counted, None, {"only": [batch]}, BYTES_V, place=lambda batch: batch)
    assert result.experts_per_token_by_layer == result.load_by_layer == []
    assert result.histogram_by_layer == []
    assert np.isnan(result.experts_per_token)
    assert np.isnan(result.domains["only"].experts_per_token)


def test_many_batches_add_up_in_double_precision():
    # In float32, 16777216 + 1 is 16777216.
    def step(params, batch):
        nothing = np.zeros((0, 1), np.int32)
        return Sums(np.float32(batch["nll"]), np.int32(1), nothing, nothing)

    one = {"targets": np.zeros((1, 1), np.int32), "segment_ids": np.ones((1, 1), np.int32)}
    batches = [one | {"nll": nll} for nll in (2.0**24, 1.0, 1.0)]
    result = evaluate(step, None, {"only": batches}, BYTES_V + 1, place=lambda batch: batch)
    assert result.loss * 3 == 2.0**24 + 2
