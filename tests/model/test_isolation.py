"""What a token may know: its own document, up to itself, and nothing of padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.losses.balance import Balance
from dynmoe_jax.routing.losses.entropy import Entropy
from dynmoe_jax.routing.losses.router_z import RouterZ

L = 12
ONE, ARANGE = np.ones((1, L), np.int32), np.arange(L)[None]
TOKENS = np.random.default_rng(0).integers(0, 32, (1, L))


@pytest.fixture(
    scope="module",
    params=[
        {"router": "top_p", "backend": "grouped"},
        {"router": "top_p", "backend": "reference"},
        {"router": "top_k", "backend": "capacity", "capacity_factor": 100.0},
    ],
    ids=lambda changes: changes["backend"],
)
def decoder(request, small, draw):
    return draw(small(**request.param))


def by_layer(loss, routing):
    """A loss of every MoE layer."""
    given = RouterInput(None, routing.by_layer.logits_TE, routing.valid_T)
    sums = loss.sums(routing.by_layer, given, {})
    return loss.value(sums, jnp.maximum(jnp.sum(routing.valid_T), 1))


def test_causality(decoder, run):
    before = run(decoder, TOKENS, ONE, ARANGE)
    for position in (1, 5, L - 1):
        changed = TOKENS.copy()
        changed[0, position] = (changed[0, position] + 7) % 32
        after = run(decoder, changed, ONE, ARANGE)
        np.testing.assert_allclose(
            after.logits[:, :position], before.logits[:, :position], rtol=0, atol=1e-6
        )
        np.testing.assert_array_equal(
            after.routing.experts_per_token[:, :, :position],
            before.routing.experts_per_token[:, :, :position],
        )
        assert np.all(np.any(np.asarray(after.logits != before.logits)[0, position:], axis=-1))


def test_defaults_are_one_document_from_position_zero(decoder, run):
    np.testing.assert_array_equal(
        run(decoder, TOKENS).logits, run(decoder, TOKENS, ONE, ARANGE).logits
    )


def test_packed_documents_are_as_if_alone(decoder, run):
    first, second = 5, L - 5
    segments = np.repeat([[1, 2]], [first, second], axis=1)
    positions = np.concatenate([np.arange(first), np.arange(second)])[None]
    packed = run(decoder, TOKENS, segments, positions)
    for start, length in ((0, first), (first, second)):
        # Alone, at the head of a sequence whose rest is padding.
        tokens, segment = np.zeros((1, L), int), np.zeros((1, L), np.int32)
        tokens[0, :length], segment[0, :length] = TOKENS[0, start : start + length], 1
        alone = run(decoder, tokens, segment, ARANGE)
        np.testing.assert_allclose(
            packed.logits[0, start : start + length], alone.logits[0, :length], rtol=0, atol=1e-5
        )
        np.testing.assert_array_equal(
            packed.routing.experts_per_token[:, 0, start : start + length],
            alone.routing.experts_per_token[:, 0, :length],
        )


def test_two_documents_in_one_segment_do_see_each_other(decoder, run):
    """The probe above would pass on a model without attention; this one would not."""
    joined = run(decoder, TOKENS, ONE, ARANGE)
    segments = np.repeat([[1, 2]], [5, L - 5], axis=1)
    split = run(decoder, TOKENS, segments, ARANGE)
    np.testing.assert_allclose(split.logits[0, :5], joined.logits[0, :5], rtol=0, atol=1e-6)
    assert np.abs(split.logits[0, 5:] - joined.logits[0, 5:]).max() > 1e-2


def test_positions_are_relative(decoder, run):
    shifted = run(decoder, TOKENS, ONE, ARANGE + 100)
    np.testing.assert_allclose(
        shifted.logits, run(decoder, TOKENS, ONE, ARANGE).logits, rtol=0, atol=1e-4
    )


def test_padding_changes_nothing(decoder, run):
    real = 8
    segments = (np.arange(L) < real).astype(np.int32)[None]
    outputs = []
    for filling in (0, 31):
        tokens = TOKENS.copy()
        tokens[:, real:] = filling
        outputs.append(run(decoder, tokens, segments, ARANGE))
    zeros, others = outputs
    np.testing.assert_array_equal(zeros.logits[:, :real], others.logits[:, :real])
    full = run(decoder, TOKENS, ONE, ARANGE)
    np.testing.assert_allclose(zeros.logits[:, :real], full.logits[:, :real], rtol=0, atol=1e-5)
    for output in outputs:
        assert np.all(output.routing.experts_per_token[:, :, real:] == 0)
        assert np.all(output.routing.experts_per_token[:, :, :real] >= 1)
        np.testing.assert_array_equal(output.routing.valid_BL, segments > 0)
    for loss in (Balance(), Entropy(), RouterZ()):
        losses = [by_layer(loss, output.routing) for output in outputs]
        np.testing.assert_array_equal(*losses)
        assert losses[0].shape == (2,)
        assert np.all(np.isfinite(losses[0]))


def test_routing_record(decoder, run):
    output = run(decoder, TOKENS, ONE, ARANGE)
    experts, layers = decoder.config.moe.num_experts, decoder.config.num_layers
    assert output.logits.shape == (1, L, 32)
    assert output.logits.dtype == jnp.float32
    assert output.routing.probs.shape == (layers, 1, L, experts)
    assert output.routing.experts_per_token.shape == (layers, 1, L)
    np.testing.assert_allclose(np.sum(output.routing.probs, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(output.routing.rows_dropped_N, [0] * layers)
    np.testing.assert_array_equal(output.routing.exists_NE, np.ones((layers, experts), bool))
