"""One result from end to end: its record beside what lies on disk, its samples and its page."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.records import from_json, to_json
from dynmoe_jax.surgery.measuring.measure import entropy_of
from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.perform import perform
from dynmoe_jax.surgery.report.page import FILE_NAME as PAGE
from dynmoe_jax.surgery.report.provenance import FILE_NAME as RECORD
from dynmoe_jax.surgery.report.samples import left_out
from dynmoe_jax.surgery.request import AUTO, Options, Request
from dynmoe_jax.training.step import TrainState
from tests.small_run import corpus, settings, tokenizer
from tests.surgery.test_surgery_page import record as record_of_page

__all__ = ["corpus", "settings", "tokenizer"]


@pytest.fixture(scope="module")
def made(settings, tokenizer, tmp_path_factory):
    """(folder of a dense parent, folder of its upcycled result, the record)."""
    folder = tmp_path_factory.mktemp("surgery")
    whole = config.to_dict(settings)
    whole["model"]["moe"] = {"every_n_layers": 0}
    cfg, random = config.from_config_dict(whole), np.random.default_rng(0)
    draw = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(cfg.model))
    parent = folder / "dense"
    parent.mkdir()
    tokenizer.save(parent / tokenizer.name_in_run)
    checkpoints = Checkpoints(parent, cfg.checkpoint)
    state = TrainState(jnp.int32(3), params, {"moment": jax.tree.map(jnp.copy, params)})
    checkpoints.save(3, state, {"tokenizer": tokenizer.fingerprint}, cfg)
    checkpoints.close()
    asked = Request(
        Upcycle(num_experts=4, router_std=0.0),
        (parent,),
        folder / "moe",
        Options(tokens=128, samples=1),
    )
    return parent, folder / "moe", perform(asked)


def bytes_below(folder):
    return sum(
        os.path.getsize(os.path.join(path, name))
        for path, _, names in os.walk(folder)
        for name in names
    )


def test_bytes_are_counted_from_the_files(made):
    parent, result, record = made
    before = bytes_below(parent / "checkpoints" / "3" / "state")
    after = bytes_below(result / "checkpoints" / "0" / "state")
    assert record["before"]["file_bytes"] == record["parents"][0]["file_bytes"] == before
    assert record["after"]["file_bytes"] == after
    assert after != record["after"]["stored_bytes"]


def test_the_entropy_of_an_even_router_is_that_of_an_even_choice(made):
    """Were padding counted, it would be more."""
    _, _, record = made
    assert record["before"]["router_entropy"] == {}
    assert list(record["after"]["router_entropy"]) == ["0", "1"]
    for nats in record["after"]["router_entropy"].values():
        assert nats == pytest.approx(math.log(4), rel=1e-5)


def test_entropy_by_hand():
    scores_TE = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [2.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    wanted_T = [math.log(2), 0.0, 1.5 * math.log(2), 0.0]
    np.testing.assert_allclose(entropy_of(scores_TE), wanted_T, atol=1e-6)


def test_both_models_write_the_same_where_the_function_is_kept(made):
    _, _, record = made
    (text,) = record["samples"]["texts"]
    assert text["before"]["text"] == text["after"]["text"] != ""
    assert not text["before"]["pieces"]
    assert {experts for _, experts in text["after"]["pieces"]} == {2.0}


def test_page_and_record_lie_in_the_folder(made):
    _, result, record = made
    stored = (result / RECORD).read_text(encoding="utf-8")
    assert to_json(from_json(stored)) == to_json(record)
    assert record["after"]["layers"] == [{"experts": 4, "width": 24}] * 2
    assert record["after"]["routers"] == ["top-2"]
    page = (result / PAGE).read_text(encoding="utf-8")
    assert "upcycle of dense" in page
    assert "promises to keep the function" in page


def test_pages_are_tried_on_records_of_the_same_fields(made):
    _, _, record = made
    example = record_of_page()
    for found, wanted in (
        (example, record),
        (example["before"], record["before"]),
        (example["parents"][0], record["parents"][0]),
        (example["compared"]["all"], record["compared"]["all"]),
    ):
        assert found.keys() == wanted.keys()


def test_large_models_write_only_if_they_are_asked_to():
    large = config.Config()  # 1.2B parameters
    assert "more than 300M" in left_out(AUTO, [large])
    silent = dataclasses.replace(large, evaluation=config.Evaluation(sample_tokens=0))
    assert "sample_tokens=0" in left_out(AUTO, [silent])
    assert left_out(2, [silent]) == ""
    assert left_out(2, [large]) == ""
    assert "--samples=0" in left_out(0, [large])
