"""Every architecture against what transformers computes with it, both ways, in float32.

Needs the extra ``parity`` (PyTorch and transformers); models are random and small.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.interop import load_hf

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'dynmoe_jax[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'dynmoe_jax[parity]'"
)

TOKENS_BL = np.random.default_rng(5).integers(0, 40, size=(2, 11))
# Every width another one, so that no mix-up goes unseen; parameters of order one, so that every
# part of the model is seen in the logits.
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
CASES = {
    "llama": ("Llama", {"intermediate_size": 20, "rope_parameters": {"rope_theta": 500.0}}),
    "llama, tied": ("Llama", {"intermediate_size": 20, "tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"intermediate_size": 20, "head_dim": 10}),
}


def their_model(kind, settings):
    """A random model of transformers; norms and biases too are drawn."""
    torch.manual_seed(1)
    cfg = getattr(transformers, f"{kind}Config")(**SHAPE | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BL)).logits.numpy()


@pytest.fixture(scope="module", params=list(CASES))
def theirs(request, tmp_path_factory):
    """(folder in their format, logits)."""
    model = their_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return folder, their_logits(model)


def test_logits(theirs):
    folder, wanted = theirs
    logits = nnx.jit(lambda decoder, tokens_BL: decoder(tokens_BL).logits)(
        load_hf(folder, dtype="float32"), jnp.asarray(TOKENS_BL)
    )
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
