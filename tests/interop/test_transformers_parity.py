"""Every architecture against what transformers computes with it, both ways, in float32.

Needs the extra ``parity`` (PyTorch and transformers); models are random and small.
"""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dynmoe_jax import config
from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.model import Decoder
from dynmoe_jax.runs.checkpoint import Checkpoints

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
    "mixtral, a window of all": ("Mixtral", {"num_local_experts": 5, "sliding_window": 32}),
    "olmoe": ("Olmoe", EXPERTS),
    "olmoe, renormalised": ("Olmoe", EXPERTS | {"norm_topk_prob": True}),
    "qwen2-moe": ("Qwen2Moe", QWEN),
    "qwen2-moe, wide heads": ("Qwen2Moe", QWEN | {"head_dim": 8}),
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
        from tests.interop import deepseek_torch

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


def config_with(model):
    return config.Config(model=model, data=config.Data(seq_len=8))


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


@pytest.fixture(scope="module")
def returned(theirs, tmp_path_factory):
    """Their model, imported and exported again."""
    folder, _ = theirs
    places = tmp_path_factory.mktemp("ours")
    import_model(folder, places / "run")
    export_model(places / "run", places / "hf")
    return places / "hf"


def test_round_trip_is_exact(theirs, returned):
    before, after = (load_file(path / "model.safetensors") for path in (theirs[0], returned))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == np.float32
        np.testing.assert_array_equal(tensor, after[name])


def test_export_loads_in_their_class(theirs, returned):
    _, wanted = theirs
    settings = json.loads((returned / "config.json").read_text())
    if settings["model_type"] == "deepseek":
        pytest.skip("transformers has no class for DeepSeekMoE version 1; its code is on the hub")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        returned, output_loading_info=True
    )
    assert type(model).__name__ == settings["architectures"][0]
    assert not any(report.values())
    np.testing.assert_allclose(logits_of(model), wanted, rtol=0, atol=1e-5)


RENORMALIZED = {"router": "top_k", "top_k": {"k": 2, "renormalize": True}}
OURS = {
    "top_k, as the paper's": (
        "Qwen2MoeForCausalLM",
        {"moe": {"router": "top_k", "top_k": {"k": 2}}},
    ),
    "top_k, first of two": (
        "Qwen2MoeForCausalLM",
        {"moe": RENORMALIZED | {"every_n_layers": 2}},
    ),
    "top_k, renormalised": (
        "MixtralForCausalLM",
        {"moe": RENORMALIZED},
    ),
    "top_p": ("MoEForCausalLM", {"moe": {"top_p": {"threshold": 0.5}}}),
    "top_p, of two, tied, grouped": (
        "MoEForCausalLM",
        {
            "moe": {"top_p": {"threshold": 0.5, "renormalize": True}, "every_n_layers": 2},
            "tie_embeddings": True,
            "num_kv_heads": 2,
            "rope_theta": 500.0,
        },
    ),
}


@pytest.fixture(scope="module", params=list(OURS))
def ours(request, tmp_path_factory):
    """(class, model of theirs, decoder) of a model of ours that was exported."""
    name, changes = OURS[request.param]
    moe = config.MoE(num_experts=5, hidden_width=12, **changes["moe"])
    shape = {"width": 24, "num_heads": 6, "num_kv_heads": 6, "head_width": 4, "vocab_size": 40}
    shape |= {"hidden_width": 20, "num_layers": 4, "max_seq_len": 32, "init_std": 0.3}
    model = config.Model(dtype="float32", **shape | changes | {"moe": moe})
    decoder = Decoder(model, rngs=nnx.Rngs(3))
    folder = tmp_path_factory.mktemp("ours")
    with contextlib.closing(Checkpoints(folder / "run", config.Checkpoint())) as checkpoints:
        state = {"params": nnx.state(decoder, nnx.Param)}
        checkpoints.save(7, state, {"tokenizer": ""}, config_with(model))
    export_model(folder / "run", folder / "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values())
    return name, theirs.eval(), decoder


def test_our_model_in_their_class(ours):
    name, theirs, decoder = ours
    assert type(theirs).__name__ == name
    logits = nnx.jit(lambda decoder, tokens_BL: decoder(tokens_BL).logits)(
        decoder, jnp.asarray(TOKENS_BL)
    )
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(logits_of(theirs), logits, rtol=0, atol=1e-4)


def test_their_generation_with_our_code(ours):
    """Greedy, with a cache and left padding, as without either."""
    _, theirs, _ = ours
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    prompts = torch.tensor(TOKENS_BL[:, :7])
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    batch = theirs.generate(prompts, attention_mask=mask, **settings)
    for row, start in ((0, 0), (1, 3)):
        tokens = prompts[row, start:]
        for _ in range(6):
            with torch.no_grad():
                following = theirs(tokens[None]).logits[0, -1].argmax()
            tokens = torch.cat([tokens, following[None]])
        assert batch[row, 7:].tolist() == tokens[-6:].tolist()


def test_their_loss_is_of_the_next_token(ours):
    name, theirs, _ = ours
    if name != "MoEForCausalLM":
        pytest.skip("a class of transformers itself")
    tokens = torch.tensor(TOKENS_BL)
    with torch.no_grad():
        output = theirs(tokens, labels=tokens)
    wanted = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    np.testing.assert_allclose(output.loss, wanted, rtol=1e-6)
