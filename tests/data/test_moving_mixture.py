"""Weights of domains that move in the middle of a stream, and the rule that moves them."""

import dataclasses
import json
import math

import grain
import numpy as np
import pytest

from dynmoe_jax.data import DataError, TrainStream, merge_states
from dynmoe_jax.data.moving_mixture import DomainRows, MovingMixture
from dynmoe_jax.data.reweighting.dynamic_batch_loading import DynamicBatchLoading

# ── The rule ─────────────────────────────────────────────────────────────────────────────────────


def test_weights_are_those_of_the_formula_by_hand():
    rule = DynamicBatchLoading()
    moved = rule(
        {"a": 0.5, "b": 0.3, "c": 0.2},
        {"a": 2.0, "b": 3.0, "c": 1.0},
        {"a": 2.0, "b": 2.5, "c": 1.5},
    )
    raw = {"a": 0.5, "b": 0.3 * math.exp(0.5), "c": 0.2 * math.exp(-0.5)}
    total = sum(raw.values())
    wanted = {name: (1 - 1e-4) * w / total + 1e-4 / 3 for name, w in raw.items()}
    assert moved == pytest.approx(wanted, rel=1e-12)
    assert sum(moved.values()) == pytest.approx(1, abs=1e-12)


def test_weights_move_toward_the_domain_whose_loss_exceeds_its_reference():
    rule, weights = DynamicBatchLoading(), {"a": 0.6, "b": 0.3, "c": 0.1}
    reference = dict.fromkeys(weights, 2.0)
    moved = rule(weights, {"a": 2.0, "b": 2.0, "c": 2.4}, reference)
    assert moved["c"] > weights["c"]
    assert moved["a"] < weights["a"]
    assert moved["b"] < weights["b"]
    same = rule(weights, reference, reference)
    assert same == pytest.approx(weights, abs=1e-4)
    again = rule(moved, {"a": 2.0, "b": 2.0, "c": 2.4}, reference)
    assert again["c"] > moved["c"]


def test_losses_far_apart_leave_every_weight_a_number_above_zero():
    moved = DynamicBatchLoading()({"a": 0.5, "b": 0.5}, {"a": 5e3, "b": 0.0}, {"a": 0.0, "b": 5e3})
    assert moved["b"] == pytest.approx(5e-5)
    assert sum(moved.values()) == pytest.approx(1)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────


def mixture(weights, phase=0):
    def rows(name):
        endless = grain.MapDataset.source([{"domain": name}]).repeat()
        return DomainRows(lambda first: endless[first:].to_iter_dataset())

    return iter(MovingMixture({name: rows(name) for name in weights}, weights, None, phase))


def counts(rows):
    names, numbers = np.unique([row["domain"] for row in rows], return_counts=True)
    return dict(zip(names.tolist(), numbers.tolist(), strict=True))


def test_shares_hold_over_any_stretch_before_and_after_weights_move():
    rows = mixture({"a": 0.7, "b": 0.2, "c": 0.1})
    taken = [next(rows) for _ in range(40)]
    for start in range(30):
        assert counts(taken[start : start + 10]) == {"a": 7, "b": 2, "c": 1}
    rows.set_state({**rows.get_state(), "weights": {"a": 0.1, "b": 0.1, "c": 0.8}})
    taken = [next(rows) for _ in range(40)]
    for start in range(30):
        found = counts(taken[start : start + 10])
        assert abs(found["c"] - 8) <= 1


def test_rows_of_one_round_over_the_shards_are_a_mixture_too():
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    shards = [mixture(weights, phase) for phase in range(8)]
    for _ in range(5):
        assert counts(next(rows) for rows in shards) == {"a": 4, "b": 2, "c": 2}


@pytest.fixture
def data(settings):
    return dataclasses.replace(
        settings, domain_weights="alpha=2,beta=1,gamma=1", reweighting="dynamic_batch_loading"
    )


MOVED = {"alpha": 0.1, "beta": 0.2, "gamma": 0.7}


def rows_of(stream, batches):
    return [next(stream)["tokens"].copy() for _ in range(batches)]


def test_a_stream_whose_weights_moved_goes_on_bit_for_bit_with_any_number_of_readers(
    prepared, tokenizer, data
):
    def open_stream(shard_ids=None):
        return TrainStream(prepared, tokenizer, data, 8, 0, shard_ids)

    with open_stream() as whole:
        rows_of(whole, 5)
        before = rows_of(whole, 0)
        whole.move_weights(MOVED)
        assert whole.domain_weights == MOVED
        rows_of(whole, 3)
        state = json.loads(json.dumps(whole.get_state(), sort_keys=True))
        expected = rows_of(whole, 6)
    assert not before
    parts = [open_stream([0, 1]), open_stream([2, 3])]
    for part in parts:
        rows_of(part, 5)
        part.move_weights(MOVED)
        rows_of(part, 3)
    assert merge_states([part.get_state() for part in parts]) == state
    for part in parts:
        part.close()
    with open_stream() as resumed:
        resumed.set_state(state)
        assert resumed.domain_weights == MOVED
        assert all(map(np.array_equal, rows_of(resumed, 6), expected))


def test_weights_hold_from_the_next_batch_on_whatever_was_made_ahead(prepared, tokenizer, data):
    with (
        TrainStream(prepared, tokenizer, data, 8, 0) as patient,
        TrainStream(prepared, tokenizer, data, 8, 0) as moved,
    ):
        for stream in (patient, moved):
            rows_of(stream, 4)
        moved.move_weights(patient.domain_weights)  # the same: nothing is lost or repeated
        assert all(map(np.array_equal, rows_of(patient, 5), rows_of(moved, 5)))
        moved.move_weights(MOVED)
        assert not np.array_equal(*(np.stack(rows_of(s, 3)) for s in (patient, moved)))


def test_without_weights_they_begin_with_the_shares_of_the_domains(prepared, tokenizer, data):
    with TrainStream(
        prepared, tokenizer, dataclasses.replace(data, domain_weights=""), 8, 0
    ) as stream:
        bytes_of = {name: amount.bytes for name, amount in prepared.train.items()}
        wanted = {name: size / sum(bytes_of.values()) for name, size in bytes_of.items()}
        assert stream.domain_weights == pytest.approx(wanted)


def test_a_domain_that_is_left_out_stays_out(prepared, tokenizer, data):
    weights = "alpha=2,beta=1,gamma=0"
    with TrainStream(
        prepared, tokenizer, dataclasses.replace(data, domain_weights=weights), 8, 0
    ) as stream:
        assert stream.domain_weights.keys() == {"alpha", "beta"}


def test_a_position_of_weights_that_stay_is_refused(prepared, tokenizer, settings, data):
    fixed = dataclasses.replace(settings, domain_weights=data.domain_weights)
    with (
        TrainStream(prepared, tokenizer, fixed, 8, 0) as stream,
        TrainStream(prepared, tokenizer, data, 8, 0) as other,
        pytest.raises(DataError, match=r"config\.data\.reweighting="),
    ):
        other.set_state(stream.get_state())
