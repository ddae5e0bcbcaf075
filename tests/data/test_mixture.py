"""Examples-proportional mixtures with a cap, against the proportions by arithmetic."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import DataError, TrainStream
from dynmoe_jax.data.mixture import parse_cap, proportional_counts
from dynmoe_jax.data.packing import shard_rows
from dynmoe_jax.data.sources.registry import check_sources
from tests.data.test_packing import CHARACTERS
from tests.data.test_stream import rows_of, same

EXAMPLES = {"large": 4000, "middle": 700, "small": 40}


@pytest.mark.parametrize(
    ("cap", "rates"),
    [(None, (4000, 700, 40)), (1000, (1000, 700, 40)), (100, (100, 100, 40)), (1, (1, 1, 1))],
)
def test_a_task_counts_with_its_examples_up_to_the_cap(cap, rates):
    assert tuple(proportional_counts(EXAMPLES, cap).values()) == rates


@pytest.mark.parametrize("cap", [None, 1000, 100])
def test_documents_come_in_the_analytic_proportions(cap):
    """However long documents are: every domain's fill another number of rows."""
    lengths = {"large": 3, "middle": 40, "small": 9}
    documents = {n: [{"text": n[0].encode() * lengths[n]}] * c for n, c in EXAMPLES.items()}
    counts, shards = proportional_counts(EXAMPLES, cap), 4
    drawn = collections.Counter()
    for shard in range(shards):
        rows = shard_rows(documents, counts, CHARACTERS, 64, 0, shard, shards, 1, by_examples=True)
        begun = 0
        for row in rows:
            # What stands behind BOS tells the domain.
            for at in np.flatnonzero(row["positions"] == 0):
                if row["tokens"][at] == CHARACTERS.bos_id and at + 1 < 64:
                    drawn[chr(row["tokens"][at + 1])] += 1
                    begun += 1
            if begun > 1500:
                break
    total = sum(drawn.values())
    for name, count in counts.items():
        rate = count / sum(counts.values())
        # A document whose BOS ends a row is not counted, which is rare.
        assert drawn[name[0]] / total == pytest.approx(rate, rel=0.06), name


def test_a_capped_task_still_shows_all_its_examples():
    documents = {"a": [{"text": c.encode()} for c in "abcdefghij"], "z": [{"text": b"z"}] * 2}
    rows = shard_rows(documents, {"a": 2, "z": 2}, CHARACTERS, 2, 0, 0, 1, 1, by_examples=True)
    seen = [chr(row["tokens"][1]) for row in itertools.islice(rows, 20)]
    assert sorted(seen) == sorted("abcdefghij" + 10 * "z")


@pytest.mark.parametrize("weights", ["proportional", "proportional:cap=20"])
def test_a_mixture_goes_on_exactly_where_it_stopped(prepared, tokenizer, settings, weights):
    data = dataclasses.replace(settings, domain_weights=weights)
    with TrainStream(prepared, tokenizer, data, 4, 0) as stream:
        rows_of(stream, 7)
        state = json.loads(json.dumps(stream.get_state()))
        after = rows_of(stream, 9)
    with TrainStream(prepared, tokenizer, data, 4, 0) as resumed:
        resumed.set_state(state)
        assert same(rows_of(resumed, 9), after)
    other = dataclasses.replace(settings, domain_weights="proportional:cap=21")
    with (
        TrainStream(prepared, tokenizer, other, 4, 0) as another,
        pytest.raises(DataError, match=r"config\.data\.domain_weights='proportional.*cap=21"),
    ):
        another.set_state(state)


@pytest.mark.parametrize("weights", ["proportional:cap=0", "proportional:3", "proportional:cap=x"])
def test_a_cap_that_is_no_number_is_refused(weights):
    with pytest.raises(DataError, match=r"must be 'proportional', or 'proportional:cap=N'"):
        check_sources(config.Data(domain_weights=weights))


def test_spaces_do_no_harm():
    assert parse_cap(" proportional : cap = 30 ") == 30
