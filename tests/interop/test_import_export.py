"""Into a run's folder and out again: every architecture, exactly; what is refused; what is left."""

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, processors

from dynmoe_jax import config
from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.__main__ import main, parse
from dynmoe_jax.interop.architectures.mapping import parameter_slices
from dynmoe_jax.interop.architectures.registry import ARCHITECTURES, architecture_for
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.interop.files.tensor_writer import TensorWriter
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.model import Decoder, parameter_shapes
from dynmoe_jax.runs.begun import check_not_imported
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.saving import chunks

SHAPE = {
    "vocab_size": 20,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "intermediate_size": 10,
}
QWEN = {"moe_intermediate_size": 6, "num_experts": 4, "shared_expert_intermediate_size": 8}
SETTINGS = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": QWEN | {"mlp_only_layers": [0, 1]},
    "DeepseekForCausalLM": {
        "moe_intermediate_size": 6,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "MoEForCausalLM": {"model_type": "dynamic_moe", "num_experts": 4, "expert_frequency": 3},
}


def write_hf(folder, name):
    """A folder with random tensors and a tokenizer of five tokens."""
    folder.mkdir()
    settings = {"architectures": [name], **SHAPE, **SETTINGS[name]}
    (folder / "config.json").write_text(json.dumps(settings))
    architecture = ARCHITECTURES[name]
    model = architecture.model_from_hf(settings)
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}
    found = parameter_slices(architecture.rules, model, shapes)
    foreign = {n: ours.layout.foreign_shape(ours.shape(shapes)) for n, ours in found.items()}
    writer = TensorWriter(folder, foreign, "float32", 4000)
    random = np.random.default_rng(1)
    for tensor, shape in foreign.items():
        writer.write(tensor, random.normal(size=shape))
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tensors_in(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture(scope="module", params=list(SETTINGS))
def travelled(request, tmp_path_factory):
    """(folder, folder of the run, folder exported from it) of one architecture."""
    scratch = tmp_path_factory.mktemp("travelled")
    source = write_hf(scratch / "hf", request.param)
    import_model(source, scratch / "run")
    export_model(scratch / "run", scratch / "back")
    return source, scratch / "run", scratch / "back"


def test_round_trip_is_exact(travelled):
    source, _, back = travelled
    before, after = tensors_in(source), tensors_in(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    names = [json.loads((f / "config.json").read_text())["architectures"] for f in (source, back)]
    assert names[0] == names[1]


def test_imported_run_is_what_load_hf_gives(travelled):
    source, run, _ = travelled
    cfg, decoder, tokenizer = load_run(run)
    wanted = load_hf(source)
    assert cfg.model == wanted.config
    for (path, actual), (_, leaf) in zip(
        nnx.state(decoder).flat_state(), nnx.state(wanted).flat_state(), strict=True
    ):
        np.testing.assert_array_equal(actual[...], leaf[...], err_msg=str(path))
    assert tokenizer.encode("abc").tolist() == [4, 3]


def test_an_expert_is_one_chunk_on_disk(tmp_path, monkeypatch):
    """Whoever works on a model expert by expert would read a whole layer for each else."""
    monkeypatch.setattr(chunks, "SMALL_BYTES", 4)
    source = write_hf(tmp_path / "hf", "MixtralForCausalLM")
    import_model(source, tmp_path / "run")
    base = f"file://{tmp_path}/run/checkpoints/0/state/"
    layer = "params.groups.layers.0"
    for name, chunk in {
        "feed_forward.gate_up_ED2F": (1, 1, 12, 20),
        "feed_forward.down_EFD": (1, 1, 10, 12),
        "attention.query_DHW": (1, 12, 3, 4),
    }.items():
        store = {"driver": "ocdbt", "base": base, "path": f"{layer}.{name}.value/"}
        array = ts.open({"driver": "zarr", "kvstore": store}, read=True).result()
        assert array.chunk_layout.read_chunk.shape == chunk
    export_model(tmp_path / "run", tmp_path / "back")
    before, after = tensors_in(source), tensors_in(tmp_path / "back")
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


def test_tokenizer_travels_along(travelled):
    source, _, back = travelled
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 0


def test_transformers_would_not_take_another_class(tmp_path):
    source = write_hf(tmp_path / "hf", "OlmoeForCausalLM")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    import_model(source, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back")
    # OLMoE's own class would put parts of its own in the ours of those of tokenizer.json.
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings == {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_eos_after_each_text_is_said(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", "LlamaForCausalLM")
    made = Tokenizer.from_file(str(source / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 0)])
    made.save(str(source / "tokenizer.json"))
    import_model(source, tmp_path / "run")
    assert "puts EOS after each text" in " ".join(capsys.readouterr().out.split())


def test_large_models_are_split_over_files(travelled, tmp_path):
    source, run, _ = travelled
    export_model(run, tmp_path / "hf", shard_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "hf" / name).stat().st_size < 4000 + 4096 for name in files)
    before, after = load_hf(source), load_hf(tmp_path / "hf")
    for (_, a), (_, b) in zip(
        nnx.state(before).flat_state(), nnx.state(after).flat_state(), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...])


def test_bfloat16(travelled, tmp_path):
    source, run, _ = travelled
    main(parse(["export", "--from", str(run), "--to", str(tmp_path / "hf"), "--dtype=bfloat16"]))
    wanted = tensors_in(source)
    for name, tensor in tensors_in(tmp_path / "hf").items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, wanted[name].astype(ml_dtypes.bfloat16))


def test_nothing_is_overwritten(travelled, tmp_path):
    source, run, back = travelled
    with pytest.raises(config.ConfigError, match="holds checkpoints of a run"):
        import_model(source, run)
    with pytest.raises(config.ConfigError, match="is not empty"):
        export_model(run, back)
    with pytest.raises(config.ConfigError, match="holds no run"):
        export_model(tmp_path, tmp_path / "hf")


def test_training_does_not_begin_anew_on_top_of_it(travelled):
    with pytest.raises(config.ConfigError, match="that was not trained there"):
        check_not_imported(travelled[1])


def run_of(model, folder):
    """A run's folder with a random model."""
    params = nnx.map_state(lambda _, x: np.zeros(x.shape, np.float32), parameter_shapes(model))
    cfg = config.Config(model=model, data=config.Data(seq_len=8))
    with contextlib.closing(Checkpoints(folder, config.Checkpoint())) as checkpoints:
        checkpoints.save(3, {"params": params}, {"tokenizer": ""}, cfg)
    return folder


SMALL = {"num_layers": 2, "width": 8, "num_heads": 2, "num_kv_heads": 2, "head_width": 4}
SMALL |= {"hidden_width": 8, "vocab_size": 8, "max_seq_len": 8}


@pytest.mark.parametrize(
    ("changes", "moe", "setting"),
    [
        ({"qk_norm": True}, {"router": "top_p"}, "config.model.qk_norm"),
        ({}, {"router": "top_p", "shared_hidden_width": 8}, "moe.shared_hidden_width"),
        ({}, {"router": "top_k", "routed_scale": 2.0}, "config.model.moe.routed_scale"),
        ({}, {"every_n_layers": 2, "layer_offset": 1}, "config.model.moe.every_n_layers"),
    ],
)
def test_model_that_no_format_has_is_refused(tmp_path, changes, moe, setting):
    moe = config.MoE(num_experts=4, hidden_width=8, **moe)
    run = run_of(config.Model(**SMALL, **changes, moe=moe), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"no format of Hugging Face's.*without") as caught:
        export_model(run, tmp_path / "hf")
    assert setting in str(caught.value)
    assert not (tmp_path / "hf").exists()


def run_with_budget(folder, p_N):
    """A run's folder with a random model, whose budget has moved p to that of each layer."""
    top_p = {"experts_per_token": 1.5, "budget_rule": "proportional_integral", "renormalize": True}
    moe = config.MoE(num_experts=4, hidden_width=8, top_p=top_p)
    model = config.Model(**SMALL, moe=moe, init_std=0.5)
    decoder = Decoder(model, rngs=nnx.Rngs(0))
    [feed_forward] = decoder.moe_feed_forwards
    feed_forward.threshold[...] = np.asarray(p_N, np.float32)
    cfg = config.Config(model=model, data=config.Data(seq_len=8))
    with contextlib.closing(Checkpoints(folder, config.Checkpoint())) as checkpoints:
        checkpoints.save(3, {"params": nnx.state(decoder)}, {"tokenizer": ""}, cfg)
    return decoder


@pytest.mark.parametrize("p", [0.6137, 0.0])
def test_a_budget_is_exported_as_the_p_that_it_has_come_to(tmp_path, p):
    decoder = run_with_budget(tmp_path / "run", [p, p])
    assert export_model(tmp_path / "run", tmp_path / "hf").name == "MoEForCausalLM"
    written = json.loads((tmp_path / "hf" / "config.json").read_text())["top_p_threshold"]
    assert np.float32(written) == pytest.approx(np.float32(p), abs=1e-30)
    tokens_BL = np.arange(24).reshape(3, 8) % 8
    ours, theirs = decoder(tokens_BL), load_hf(tmp_path / "hf")(tokens_BL)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    used = ours.routing.experts_per_token
    np.testing.assert_array_equal(used, theirs.routing.experts_per_token)
    assert np.unique(used).size == (2 if p else 1)


def test_a_budget_whose_layers_have_another_p_each_is_not_exported(tmp_path):
    run_with_budget(tmp_path / "run", [0.3, 0.6])
    with pytest.raises(CheckpointError, match=r"has come to another state \(.*threshold"):
        export_model(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("moe", "name"),
    [
        ({"every_n_layers": 0}, "LlamaForCausalLM"),
        ({"router": "top_k", "top_k": {"renormalize": True}}, "MixtralForCausalLM"),
        ({"router": "top_k", "top_k": {"k": 1}}, "Qwen2MoeForCausalLM"),
        ({"router": "top_k", "shared_hidden_width": 16}, "DeepseekForCausalLM"),
        ({"router": "top_p"}, "MoEForCausalLM"),
    ],
)
def test_first_format_that_fits(moe, name):
    moe = config.MoE(num_experts=4, hidden_width=8, **moe)
    assert architecture_for(config.Model(**SMALL, moe=moe)).name == name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3"}}, "scaled rotary"),
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias=True"),
        ("MixtralForCausalLM", {"sliding_window": 8}, "sliding_window=8"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (
            "Qwen2MoeForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8},
            "sliding_window=8",
        ),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}, r"layers \[0, 2\] of 3"),
        ("DeepseekForCausalLM", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("DeepseekForCausalLM", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, name, change, message):
    folder = write_hf(tmp_path / "hf", name)
    settings = {"architectures": [name], **SHAPE, **SETTINGS[name], **change}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensor_of_another_shape_is_named_before_anything_is_written(tmp_path):
    folder = write_hf(tmp_path / "hf", "MixtralForCausalLM")
    settings = json.loads((folder / "config.json").read_text()) | {"num_local_experts": 5}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.block_sparse_moe\."):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
