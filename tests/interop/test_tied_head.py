"""Tied embeddings whose files hold the output projection too, or it alone."""

import json

import numpy as np
import pytest

from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.runs.checkpoint import Checkpoints
from tests.interop.small_models import settings_of, tensors_of, write

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(name, **more):
    """Settings and tensors of a tied model, with more tensors."""
    tensors = tensors_of(name, tie_word_embeddings=True)
    more = {
        tensor: tensors[EMBEDDING] if value is None else value for tensor, value in more.items()
    }
    return settings_of(name, tie_word_embeddings=True), tensors | more


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2MoeForCausalLM", "MoEForCausalLM"])
def test_an_equal_head_is_read_as_the_embedding(tmp_path, name):
    settings, tensors = tied(name, **{HEAD: None})
    decoder = load_hf(write(tmp_path, settings, tensors))
    assert decoder.config.tie_embeddings
    np.testing.assert_array_equal(decoder.embedding_VD[...], tensors[EMBEDDING])


def test_a_head_alone_is_the_embedding(tmp_path):
    settings, tensors = tied("LlamaForCausalLM", **{HEAD: None})
    wanted = tensors.pop(EMBEDDING)
    folder = write(tmp_path / "hf", settings, tensors)
    np.testing.assert_array_equal(load_hf(folder).embedding_VD[...], wanted)
    import_model(folder, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", None)
    assert checkpoints.config(0).model.tie_embeddings
    checkpoints.close()


def test_a_head_of_another_type_may_be_equal_too(tmp_path):
    settings, tensors = tied("LlamaForCausalLM", **{HEAD: None})
    tensors[EMBEDDING] = tensors[EMBEDDING].astype(np.float16)
    tensors[HEAD] = tensors[EMBEDDING].astype(np.float32)
    tensors[HEAD][3, 2] = tensors[EMBEDDING][3, 2] = np.nan
    load_hf(write(tmp_path, settings, tensors))


@pytest.mark.parametrize("shape", [(20, 12), (24, 12), (20, 11)])
def test_a_head_that_differs_is_refused_with_that_reason(tmp_path, shape):
    settings, tensors = tied("LlamaForCausalLM")
    tensors[HEAD] = np.zeros(shape, np.float32)
    copied = [slice(0, min(pair)) for pair in zip(shape, (20, 12), strict=True)]
    tensors[HEAD][*copied] = tensors[EMBEDDING][*copied]
    if shape == (20, 12):
        tensors[HEAD][19, 11] += 1
    folder = write(tmp_path / "hf", settings, tensors)
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings.*{HEAD} differs from"):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_untied_when_asked_for(tmp_path):
    """The file's own output projection is there for a model that is to have one."""
    settings, tensors = tied("LlamaForCausalLM", **{HEAD: np.ones((20, 12), np.float32)})
    folder = write(tmp_path, settings, tensors)
    decoder = load_hf(folder, tie_embeddings=False)
    np.testing.assert_array_equal(decoder.head_DV[...], np.ones((12, 20)))
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    np.testing.assert_array_equal(load_hf(folder).head_DV[...], np.ones((12, 20)))
