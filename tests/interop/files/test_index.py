"""A sharded checkpoint's index says which file each tensor comes from."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.runs.load import opened_run
from tests.interop.small_models import settings_of, tensors_of, write

NORM, FIRST, FIXED = "model.norm.weight", "model-00001-of-00001.safetensors", "fixed.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A Llama whose last norm was put right in a file of its own, which the index names."""
    folder, tensors = tmp_path / "hf", tensors_of("LlamaForCausalLM")
    write(folder, settings_of("LlamaForCausalLM"), tensors)
    (folder / "model.safetensors").rename(folder / FIRST)
    fixed = {NORM: np.full(12, 7, np.float32), "leftover": np.zeros(1, np.float32)}
    save_file(fixed, folder / FIXED)
    write_index(folder, dict.fromkeys(tensors, FIRST) | {NORM: FIXED})
    return folder


def write_index(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_a_tensor_comes_from_the_file_that_the_index_names(folder, tmp_path):
    np.testing.assert_array_equal(load_hf(folder).norm.scale[...], np.full(12, 7))
    import_model(folder, tmp_path / "run")
    with opened_run(tmp_path / "run") as run:
        [(_, values)] = run.slices(("norm", "scale"))
    np.testing.assert_array_equal(values, np.full(12, 7))
    write_index(folder, weight_map(folder) | {NORM: FIRST})
    wanted = load_file(folder / FIRST)[NORM]
    np.testing.assert_array_equal(load_hf(folder).norm.scale[...], wanted)


def test_a_tensor_that_the_index_does_not_list_is_not_loaded(folder):
    rest = weight_map(folder)
    del rest[NORM]
    write_index(folder, rest)
    with pytest.raises(CheckpointError, match=rf"tensor {NORM} is missing"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: "gone.safetensors"}, rf"names gone\.safetensors for {NORM}.*does not exist"),
        ({NORM: "../x.safetensors"}, rf"'\.\./x\.safetensors' for {NORM}"),
        ({NORM: "/x.safetensors"}, rf"'/x\.safetensors' for {NORM}"),
        ({NORM: 5}, f"5 for {NORM}"),
        ({NORM: ["a", "b"]}, f"for {NORM}"),
        ({NORM: ""}, f"'' for {NORM}"),
        ({"model.embed_tokens.weight": FIXED}, rf"{FIXED} for model\.embed_tokens\.weight.*lacks"),
    ],
)
def test_what_the_index_names_and_is_not_there_is_named(folder, change, message):
    write_index(folder, weight_map(folder) | change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


def test_a_whole_file_beside_an_index_that_does_not_name_it_is_refused(folder):
    (folder / FIXED).with_name("model.safetensors").write_bytes((folder / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*index.*remove one"):
        load_hf(folder)
    write_index(folder, dict.fromkeys(tensors_of("LlamaForCausalLM"), "model.safetensors"))
    load_hf(folder)
