"""``--routing`` of a run, from end to end: two checkpoints alike, and a third one."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.evaluation import __main__ as command
from dynmoe_jax.runs import checkpoint
from dynmoe_jax.training.step import TrainState


@pytest.fixture(scope="module")
def analyzed(state, settings, tokenizer, tmp_path_factory):
    """The record and the page of a model whose experts have room for half of their tokens."""
    folder = tmp_path_factory.mktemp("analyzed")
    tokenizer.save(folder / tokenizer.name_in_run)
    checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint(keep=3))
    other = jax.tree.map(lambda x: x[..., ::-1], state.params)
    for step, params in ((1, other), (2, state.params), (3, state.params)):
        position = {"tokenizer": tokenizer.fingerprint}
        checkpoints.save(step, TrainState(jnp.int32(step), params, {}), position, settings)
    checkpoints.close()
    for name in ("one", "two"):
        lines = [
            json.dumps({"text": f"Text {i} of domain {name}. " * (i + 2), "domain": name})
            for i in range(6)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    flags = [f"--workdir={folder}", f"--routing=jsonl:{folder}/*.jsonl", "--window=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluation", *flags, "--batch_tokens=128"])
        assert command.main() == 0
    record = json.loads((folder / "evaluation" / "routing.json").read_text())
    return record, (folder / "evaluation" / "routing.html").read_text()


def test_every_mean_agrees_with_the_mean_of_its_parts(analyzed):
    record, _ = analyzed
    experts = record["experts_per_token"]
    assert record["documents"] == 12
    for parts in (
        experts["by_layer"],
        list(experts["by_domain"].values()),
        experts["by_position"],
        experts["by_surprise_of_predicted_token"],
    ):
        tokens = np.array([part["tokens"] for part in parts])
        mean = np.array([part["mean"] for part in parts])
        np.testing.assert_allclose((tokens * mean).sum() / tokens.sum(), experts["all"]["mean"])
    assert experts["all"]["tokens"] == record["tokens"]
    assert experts["all"]["low"] < experts["all"]["mean"] < experts["all"]["high"]
    loads = [sum(layer["share"]) for layer in record["load_by_layer"]]
    np.testing.assert_allclose(loads, [layer["mean"] for layer in experts["by_layer"]])
    assert [part["text"] for part in experts["by_token"]["most_frequent"]]


def test_checkpoints_alike_agree_everywhere_and_others_do_not(analyzed):
    first, second = analyzed[0]["agreement"]
    assert (second["from"], second["to"]) == (2, 3)
    assert [part["mean"] for part in second["by_layer"]] == [1.0, 1.0]
    assert min(part["mean"] for part in first["by_layer"]) < 0.95


def test_the_page_has_its_pictures(analyzed):
    _, page = analyzed
    for title in ("hard to predict", "token id alone", "routing still change", "specialize"):
        assert title in page
    assert page.count("<svg") == 9
