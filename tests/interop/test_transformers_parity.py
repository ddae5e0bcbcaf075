"""Every architecture against what transformers computes with it, both ways, in float32.

Needs the extra ``parity`` (PyTorch and transformers); models are random and small.
"""

import json

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
# Every width another one, so that no mix-up goes unseen.  All multiples of 4: PyTorch's grouped
# products want rows of 16 bytes.
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "intermediate_size": 20,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3}
QWEN = EXPERTS | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 16}
DEEPSEEK = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "moe_intermediate_size": 12,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": ("Llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "olmoe": ("Olmoe", EXPERTS),
    "olmoe, renormalised": ("Olmoe", EXPERTS | {"norm_topk_prob": True}),
    "qwen2-moe": ("Qwen2Moe", QWEN),
    "qwen2-moe, every second": ("Qwen2Moe", QWEN | {"decoder_sparse_step": 2}),
    "qwen2-moe, dense first": ("Qwen2Moe", QWEN | {"mlp_only_layers": [0]}),
    "qwen2-moe, renormalised": ("Qwen2Moe", QWEN | {"norm_topk_prob": True, "qkv_bias": False}),
    "deepseek": ("Deepseek", DEEPSEEK),
    "deepseek, renormalised": ("Deepseek", DEEPSEEK | {"norm_topk_prob": True}),
}


def save_theirs(kind, settings, folder):
    """Writes a random model, norms and biases drawn too; returns its logits."""
    torch.manual_seed(1)
    if kind == "Deepseek":
        import deepseek_torch

        model = deepseek_torch.make(SHAPE | settings)
    else:
        cfg = getattr(transformers, f"{kind}Config")(**SHAPE | settings)
        model = getattr(transformers, f"{kind}ForCausalLM")(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    model.save_pretrained(folder)
    if kind == "Deepseek":
        (folder / "config.json").write_text(json.dumps(SHAPE | settings))
    return logits_of(model)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS_BL)).logits.numpy()


@pytest.fixture(scope="module", params=list(CASES))
def theirs(request, tmp_path_factory):
    """(folder in their format, logits)."""
    folder = tmp_path_factory.mktemp("theirs")
    return folder, save_theirs(*CASES[request.param], folder)


def test_logits(theirs):
    folder, wanted = theirs
    logits = nnx.jit(lambda decoder, tokens_BL: decoder(tokens_BL).logits)(
        load_hf(folder, dtype="float32"), jnp.asarray(TOKENS_BL)
    )
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
