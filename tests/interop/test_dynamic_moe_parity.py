"""The released architecture against what its PyTorch code computed for one random-weight model.

``expected.npz`` holds, for ``input_ids`` [2, 24] in float32: logits, loss, router probabilities,
experts per token, some gradients, and a greedy continuation: ``greedy`` [1, 20] is a prompt of
eight tokens (the head of ``input_ids[0]``) and twelve that follow.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.architectures.dynamic_moe import DYNAMIC_MOE
from dynmoe_jax.interop.architectures.mapping import parameter_slices
from tests.interop.foreign_tensors import to_tensors

FOLDER = Path(__file__).parent.parent / "fixtures" / "dynamic_moe_tiny"
EXPECTED = np.load(FOLDER / "expected.npz")
GRADIENTS = [name for name in EXPECTED.files if name.startswith("grad:")]
PROMPT = 8


@nnx.jit
def loss_output_gradients(decoder, tokens_BL):
    """Mean next-token cross entropy, shifted by one, as Hugging Face computes it."""

    def loss(decoder):
        output = decoder(tokens_BL)
        log_probs_BLV = jax.nn.log_softmax(output.logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs_BLV, tokens_BL[:, 1:, None], -1)), output

    (value, output), gradients = nnx.value_and_grad(loss, has_aux=True)(decoder)
    return value, output, gradients


@pytest.fixture(
    scope="module",
    params=[
        {"backend": "reference"},
        {"backend": "capacity", "capacity_factor": 100.0},
        {"backend": "grouped"},
    ],
    ids=lambda overrides: overrides["backend"],
)
def computed(request):
    """(decoder, loss, output, gradients) of one backend."""
    decoder = load_hf(FOLDER, dtype="float32", **request.param)
    return decoder, *loss_output_gradients(decoder, jnp.asarray(EXPECTED["input_ids"]))


def test_logits(computed):
    _, _, output, _ = computed
    np.testing.assert_allclose(output.logits, EXPECTED["logits"], rtol=0, atol=1e-4)


def test_experts_per_token(computed):
    _, _, output, _ = computed
    np.testing.assert_array_equal(output.routing.experts_per_token, EXPECTED["experts_per_token"])
    assert np.all(output.routing.rows_dropped_N == 0)


def test_router_probabilities(computed):
    _, _, output, _ = computed
    np.testing.assert_allclose(output.routing.probs, EXPECTED["router_probs"], rtol=0, atol=1e-5)


def test_loss(computed):
    _, loss, _, _ = computed
    np.testing.assert_allclose(loss, EXPECTED["loss"], rtol=0, atol=1e-5)


def test_gradients(computed):
    decoder, _, _, gradients = computed
    ours = {path: leaf[...] for path, leaf in gradients.flat_state()}
    shapes = {path: leaf.shape for path, leaf in ours.items()}
    theirs = to_tensors(parameter_slices(DYNAMIC_MOE.rules, decoder.config, shapes), ours)
    assert len(GRADIENTS) == 23
    for name in GRADIENTS:
        wanted, actual = EXPECTED[name], theirs[name.removeprefix("grad:")]
        assert actual.shape == wanted.shape
        error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
        assert error < 1e-4, (name, error)


def test_greedy_continuation(computed):
    decoder, *_ = computed
    wanted_L = EXPECTED["greedy"][0]
    next_token = nnx.jit(lambda decoder, tokens_BL: jnp.argmax(decoder(tokens_BL).logits, -1))
    # One fixed length; the decoder is causal, so zeros to come change nothing.
    tokens_L = np.zeros_like(wanted_L)
    tokens_L[:PROMPT] = wanted_L[:PROMPT]
    for position in range(PROMPT, len(wanted_L)):
        tokens_L[position] = next_token(decoder, tokens_L[None])[0, position - 1]
    np.testing.assert_array_equal(tokens_L, wanted_L)
