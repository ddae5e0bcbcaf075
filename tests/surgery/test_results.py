"""Folders that operations make: what they compute, what is written down, what they are good for."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.runs.load import load_run, opened_run
from dynmoe_jax.runs.records import from_json
from dynmoe_jax.surgery.perform import BrokenPromise
from dynmoe_jax.surgery.rebuild import rebuild
from dynmoe_jax.surgery.storage.parent import opened_parent
from tests.small_parent import arrays_of, dense, drawn_state, main, operate, write_parent

pytestmark = pytest.mark.slow

UPCYCLE = {"num_experts": 4, "granularity": 2, "top_k": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def upcycled(branches, folder):
    operate("upcycle", branches[0], to=folder / "upcycled", **UPCYCLE)
    return folder / "upcycled"


@pytest.fixture(scope="module")
def rounded(branches, folder):
    """Upcycled to top-p, and stored in bfloat16."""
    name = folder / "rounded"
    operate("upcycle", branches[0], to=name, num_experts=4, top_p=0.4, dtype="bfloat16")
    return name


@pytest.fixture(scope="module")
def averaged(branches, folder):
    """The average of a model and itself."""
    first = branches[0]
    operate("average", first, first, to=folder / "averaged", weights="1,2", tokens=1)
    return folder / "averaged"


def record_of(folder):
    return from_json((folder / "surgery.json").read_text())


def logits_of(folder):
    cfg, decoder, _ = load_run(folder)
    ids_BL = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (2, 16))
    return np.asarray(nnx.jit(lambda decoder, ids: decoder(ids).logits)(decoder, ids_BL))


def test_the_decoder_says_that_an_upcycled_model_is_its_parent(branches, upcycled):
    np.testing.assert_allclose(logits_of(upcycled), logits_of(branches[0]), rtol=0, atol=1e-5)


def test_the_record_has_all_that_provenance_needs(branches, upcycled, dense_settings):
    record, cfg = record_of(upcycled), load_run(upcycled)[0]
    assert record["operation"] == "upcycle"
    assert record["settings"].items() >= UPCYCLE.items()
    with opened_parent(branches[0]) as parent, opened_parent(upcycled) as result:
        told = {"folder": str(branches[0]), "digest": parent.digest}
        assert [each.items() >= told.items() for each in record["parents"]] == [True]
        # A result that becomes a parent is known by the digest that it was given.
        assert record["digest"] == result.digest
    assert record["exact"]["promised"] == 1e-5 > record["exact"]["measured"]
    before, after = record["before"], record["after"]
    assert before["parameters"] == count_parameters(dense_settings.model)
    assert after["parameters"] == count_parameters(cfg.model)
    assert after["active_parameters"] == active_parameters(cfg.model, 2)
    assert after["stored_bytes"] == sum(x.nbytes for x in arrays_of(upcycled).values())
    assert after["heldout_loss"] == pytest.approx(before["heldout_loss"], abs=1e-5)
    assert after["experts_per_token"] == 2
    assert record["history"] == []
    assert {"jax", "dynmoe_jax", "python"} <= record["versions"].keys()


def test_a_result_is_made_again_from_its_parents_alone(upcycled, branches, folder, capsys):
    lone, again = folder / "lone", folder / "again"
    lone.mkdir()
    shutil.copy(upcycled / "surgery.json", lone)
    assert main("rebuild", f"--from={lone}", f"--to={again}") == 0
    made, first = record_of(again), record_of(upcycled)
    for name in ("digest", "moments_digest", "settings", "options", "load"):
        assert (made | made["after"])[name] == (first | first["after"])[name], name
    # As if the parent had been trained on.
    first["parents"][0]["folder"] = str(branches[1])
    (lone / "surgery.json").write_text(json.dumps(first))
    with pytest.raises(ConfigError, match="is not the model that"):
        rebuild(lone, folder / "other")
    first["settings"]["of_another_version"] = 1
    (lone / "surgery.json").write_text(json.dumps(first))
    assert main("rebuild", f"--from={lone}", f"--to={folder / 'other'}") == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "unexpected keyword argument 'of_another_version'" in said
    assert not (folder / "other").exists()


def test_upcycled_models_go_to_transformers(upcycled, rounded, folder):
    for made, name in ((upcycled, "MixtralForCausalLM"), (rounded, "MoEForCausalLM")):
        out = folder / name
        assert export_model(made, out).name == name
        _, decoder, _ = load_run(made)
        wanted = dict(nnx.state(decoder, nnx.Param).flat_state())
        found = dict(nnx.state(load_hf(out), nnx.Param).flat_state())
        assert found.keys() == wanted.keys()
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(found[path][...], leaf[...], err_msg=str(path))
    assert sorted(path.name for path in (folder / "MoEForCausalLM").glob("*.py"))


def test_bfloat16_halves_what_is_stored_and_promises_nothing(branches, rounded):
    record, cfg = record_of(rounded), load_run(rounded)[0]
    assert record["after"]["stored_bytes"] == 2 * count_parameters(cfg.model)
    assert np.isnan(record["exact"]["promised"])
    assert any("rounded to bfloat16" in remark for remark in record["remarks"])
    parent, arrays = arrays_of(branches[0]), arrays_of(rounded)
    wanted = parent["embedding_VD",].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(arrays["embedding_VD",], wanted)
    with opened_parent(rounded) as result:
        assert result.digest == record["digest"]
    # Moments are not rounded.
    first = arrays_of(branches[0], "first")["embedding_VD",]
    np.testing.assert_array_equal(arrays_of(rounded, "first")["embedding_VD",], first)


def test_an_upcycled_model_writes_what_its_parent_does(branches, upcycled):
    written = []
    for folder in (branches[0], upcycled):
        _, decoder, tokenizer = load_run(folder)
        prompt, greedy = tokenizer.encode("the token"), Sampling(temperature=0.0)
        written += Generator(decoder).write([prompt], [6], greedy, vocab_size=300, stop_ids=[])
    assert len(written[0].ids) == 6
    assert list(written[0].ids) == list(written[1].ids)


def test_an_average_of_equals_is_their_model_bit_for_bit(branches, averaged):
    for group in ("params", "first", "second"):
        wanted, found = arrays_of(branches[0], group), arrays_of(averaged, group)
        assert found.keys() == wanted.keys()
        for path, values in wanted.items():
            np.testing.assert_array_equal(found[path], values, err_msg=str(path))
    with opened_run(averaged) as run, opened_run(branches[0]) as parent:
        assert run.updates == parent.updates
    assert record_of(averaged)["digest"] == record_of(averaged)["parents"][1]["digest"]


def test_results_remember_what_was_done_to_their_parents(branches, averaged, folder):
    stacked = operate("stack", averaged, to=folder / "stacked", times=2)
    assert [each["operation"] for each in stacked["history"]] == ["average"]
    with opened_parent(folder / "stacked") as result:
        assert [each["operation"] for each in result.history] == ["average", "stack"]
        assert result.history[1]["digest"] == stacked["digest"]
    # A result has the text of the parent, wherever commands are started.
    cfg = load_run(folder / "stacked")[0]
    assert cfg.data.directory == str(branches[0] / "data")
    assert cfg.model.num_layers == 4
    found, parent = arrays_of(folder / "stacked"), arrays_of(averaged)
    for path, values in found.items():
        times = len(values) // len(parent[path]) if path[0] == "groups" else 1
        whole = np.concatenate([parent[path]] * times)
        np.testing.assert_array_equal(values, whole, err_msg=str(path))


def test_feed_forwards_of_two_runs_become_experts(branches, folder):
    operate("mix", *branches, to=folder / "mixed", top_k=1, layers="1")
    found, parents = arrays_of(folder / "mixed"), [arrays_of(each) for each in branches]
    [(path, down_NEFD)] = [(p, x) for p, x in found.items() if p[-1] == "down_EFD"]
    for number, parent in enumerate(parents):
        wanted = parent["groups", "layers", 0, "feed_forward", "down_FD"][1]
        np.testing.assert_array_equal(down_NEFD[0, number], wanted)
    assert load_run(folder / "mixed")[0].model.moe_layers == (1,), path


def test_states_of_routers_and_uneven_layers_survive(settings, tokenizer, tmp_path):
    moe = {"num_experts": 4, "hidden_width": 16, "router": "sigmoid_bias", "every_n_layers": 2}
    cfg = dense(settings, num_layers=2, moe=moe)
    parent = write_parent(tmp_path / "parent", cfg, tokenizer)
    operate("stack", parent, to=tmp_path / "stacked", times=2, interleaved=True)
    moe_layers = {2 * i + copy for i in cfg.model.moe_layers for copy in (0, 1)}
    with opened_parent(parent) as before, opened_parent(tmp_path / "stacked") as after:
        assert set(after.config.model.moe_layers) == moe_layers
        found = [each.places() for each, _ in stored_in(after.config.model)]
        states = [place for places in found for place in places if place.array_name == "bias_E"]
        assert {place.layer for place in states} == moe_layers
        for place in states:
            values = before.read(place.at(place.layer // 2))
            assert np.any(values)
            np.testing.assert_array_equal(after.read(place), values)


def test_a_model_of_numbers_that_are_none_is_not_proven(dense_settings, tokenizer, tmp_path):
    state = drawn_state(dense_settings)
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))
    parent = write_parent(tmp_path / "parent", dense_settings, tokenizer, state)
    with pytest.raises(BrokenPromise, match="has a held-out loss of nan"):
        operate("upcycle", parent, to=tmp_path / "to", **UPCYCLE)
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_a_model_that_computes_in_bfloat16_is_proven_in_float32(settings, tokenizer, tmp_path):
    cfg = dense(settings, dtype="bfloat16")
    parent = write_parent(tmp_path / "parent", cfg, tokenizer)
    record = operate("upcycle", parent, to=tmp_path / "to", **UPCYCLE)
    assert record["exact"]["measured"] < 1e-5
    assert load_run(tmp_path / "to")[0].model.dtype == "bfloat16"


def test_frozen_parameters_have_moments_of_zero(dense_settings, change, tokenizer, tmp_path):
    cfg = change(dense_settings, train__trainable="norm")
    parent = write_parent(tmp_path / "parent", cfg, tokenizer)
    operate("average", parent, parent, to=tmp_path / "to")
    first = arrays_of(tmp_path / "to", "first")
    assert {path[-1] for path, values in first.items() if np.any(values)} == {"scale"}
    assert first["embedding_VD",].shape == (300, 16)
