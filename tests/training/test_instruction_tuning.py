"""Instruction tuning from files to the loss: the labels of prompts do not matter."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.data import TrainStream, kept_tokenizer, open_tokenizer, prepare
from dynmoe_jax.data.chat.template import template_of
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.surgery.recipes import sizes
from dynmoe_jax.training.objectives.response_only import ResponseOnly
from dynmoe_jax.training.trainer import train
from tests.data.test_chat_templates import TEMPLATES, folder_of
from tests.training.test_objectives import decoder, value  # noqa: F401

WORDS = ("red", "blue", "green", "white", "black")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions and answers beside a tokenizer with a template."""
    folder = tmp_path_factory.mktemp("tuning")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{a} {b}?"},
                {"role": "assistant", "content": a},
            ]
        }
        for a in WORDS
        for b in WORDS
    ]
    (folder / "first.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    folder_of(folder / "tokenizer", TEMPLATES["chatml"])
    return folder


@pytest.fixture(scope="module")
def batch(folder):
    tokenizer = open_tokenizer(folder / "tokenizer")
    data = config.Data(sources=f"instructions:{folder}/first.jsonl", seq_len=48)
    prepared = prepare(data, folder / "data", template_of(tokenizer))
    with TrainStream(prepared, tokenizer, data, 4, 0, arrays=ResponseOnly.arrays) as stream:
        # The decoder knows 16 tokens.
        return {k: jnp.asarray(v % 16 if k in ("tokens", "targets") else v)
                for k, v in next(stream).items()}  # fmt: skip


def test_labels_of_prompts_do_not_matter_and_those_of_responses_do(decoder, batch):  # noqa: F811
    x_BLD = jax.random.normal(jax.random.key(1), (*batch["tokens"].shape, 8))
    in_response_BL = np.asarray(batch["responses"]) == 1
    assert 0.1 < in_response_BL.mean() < 0.9

    def loss(changed_BL):
        targets_BL = jnp.where(changed_BL, (batch["targets"] + 5) % 16, batch["targets"])
        return value(ResponseOnly(), decoder, x_BLD, batch | {"targets": targets_BL})

    whole = loss(np.zeros_like(in_response_BL))
    assert loss(~in_response_BL) == whole
    for row, column in np.argwhere(in_response_BL)[::40]:
        one_BL = np.zeros_like(in_response_BL)
        one_BL[row, column] = True
        assert loss(one_BL) != whole


def test_documents_that_do_not_say_fall_back_on_marks(batch):
    marked = dataclasses.replace(ResponseOnly(begin="x").prepared(_Letters()))
    unknown = batch | {"responses": jnp.full_like(batch["responses"], 2)}
    without = {name: array for name, array in batch.items() if name != "responses"}
    np.testing.assert_array_equal(marked.loss_weights(unknown), marked.loss_weights(without))
    assert not np.array_equal(marked.loss_weights(batch), marked.loss_weights(without))


class _Letters:
    def encode(self, text):
        return np.array([7] * bool(text))


@pytest.mark.slow
def test_a_run_with_a_template_goes_on_with_the_same_batches(folder, tmp_path):
    """Also where nobody names the tokenizer again."""
    cfg = sizes.tiny()
    data = config.Data(
        sources=f"instructions:{folder}/first.jsonl", seq_len=64, heldout_fraction=0.1,
        tokenizer=str(folder / "tokenizer"), domain_weights="proportional:cap=9",
    )  # fmt: skip
    steps = config.Train(steps=4, batch_size=8, log_every_steps=1, objective="response_only")
    cfg = dataclasses.replace(cfg, data=data, train=steps)
    cfg = dataclasses.replace(cfg, checkpoint=config.Checkpoint(every_steps=2, keep=4))
    assert train(cfg, tmp_path / "run") == 0
    assert template_of(kept_tokenizer(tmp_path / "run")) is not None
    whole = parameters(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "summary.json").unlink()
    again = dataclasses.replace(cfg, data=dataclasses.replace(data, tokenizer=""))
    assert train(again, tmp_path / "run") == 0
    for before, after in zip(whole, parameters(tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(before, after)


def parameters(folder):
    _, model, _ = load_run(folder)
    return jax.tree.leaves(nnx.state(model))
